# SPDX-License-Identifier: Apache-2.0
"""A tensor inside a checkpoint file that is read when it is asked for."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.errors import DamagedFileError
from parallel.stored.file_range import FileRange


@dataclass(eq=False)
class StorageRecord:
    """The memory of one or more tensors, as it lies in a file under a key.

    Attributes:
        place: where it lies; older files say so only after everything else.
        checksum: CRC-32 of its bytes, where the file has one.
    """

    key: str
    dtype: torch.dtype
    nbytes: int
    place: FileRange | None = None
    checksum: int | None = None


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A view of a storage, unread; ``offset`` and ``stride`` count elements."""

    storage: StorageRecord
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def checked(storage: StorageRecord, dtype: torch.dtype, offset: Any, shape: Any, stride: Any) -> StoredTensor:
        """A tensor from numbers of unknown origin.

        Raises:
            ValueError: they do not describe a tensor inside the storage. A tensor that repeats its memory (stride 0) is
                refused as well: it would take more memory than the file has bytes.
        """
        sizes, steps = tuple(shape), tuple(stride)
        plain = all(isinstance(n, int) and 0 <= n < 1 << 62 for n in (offset, *sizes, *steps))
        if not plain or len(sizes) != len(steps) or len(sizes) > 8:
            raise ValueError("a tensor of a strange shape")
        available = storage.nbytes // dtype.itemsize
        count = math.prod(sizes)
        last = offset + sum((size - 1) * step for size, step in zip(sizes, steps)) if count else offset
        if count > available or last >= max(available, 1):
            raise ValueError(f"a tensor of shape {list(sizes)[:8]} does not fit in its storage")
        return StoredTensor(storage, dtype, offset, sizes, steps)

    def part(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> StoredTensor:
        """A region of the tensor, unread; it lies inside."""
        first = self.offset + sum(offset * step for offset, step in zip(offsets, self.stride))
        return StoredTensor(self.storage, self.dtype, first, sizes, self.stride)

    def load(self) -> Tensor:
        """Read the tensor: contiguous, on the CPU, in memory of its own.

        Raises:
            UserError: its bytes are not there or do not match their checksum.
        """
        if math.prod(self.shape) == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        place = self.storage.place
        assert place is not None, "a storage has its place once the file is read"
        span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride))
        width = self.dtype.itemsize
        data = place.read(self.offset * width, span * width)
        expected = self.storage.checksum if len(data) == self.storage.nbytes else None
        if expected is not None and zlib.crc32(data) != expected:
            raise DamagedFileError(
                f"{place.label} is damaged: its checksum does not match (or torch was set not to write any)"
            )
        flat = torch.frombuffer(data, dtype=self.dtype)
        return flat.as_strided(self.shape, self.stride).contiguous()
