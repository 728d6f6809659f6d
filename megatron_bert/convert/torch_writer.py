# SPDX-License-Identifier: Apache-2.0
"""Writes files that ``torch.load`` reads, one tensor at a time.

``torch.save`` takes all tensors at once, so a file of a large model would need the whole model in memory. The container
is simple: a zip file without compression that holds a pickle of the structure and one member a storage.
"""

from __future__ import annotations

import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.stored.torch_pickles import pickle_structure

_ALIGNMENT = 64


class TorchFileWriter:
    """A file of torch.save, open for its tensors in a ``with`` block.

    Args:
        path: of the file to write.
        structure: what torch.load will return, with a :class:`Slot` for every tensor.
    """

    def __init__(self, path: Path, structure: Any) -> None:
        self._pickled, self._keys = pickle_structure(structure)
        self._missing = set(self._keys)
        self._file = path.open("xb")
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)

    def __enter__(self) -> TorchFileWriter:
        self._member("data.pkl", self._pickled)
        self._member("version", b"3\n")
        self._member("byteorder", b"little")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            assert not self._missing, f"no values were given for {sorted(self._missing)[:3]}"
            with self._file:
                self._archive.close()
            return
        # The archive is of no use any more, and what is closed here does not complain again when it is collected.
        with suppress(OSError, ValueError):
            self._archive.close()
        with suppress(OSError):
            self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Give the values of a slot; every slot gets its own once."""
        self._missing.remove(name)
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        self._member(f"data/{self._keys[name]}", flat.numpy().data)

    def _member(self, name: str, content: Any) -> None:
        info = zipfile.ZipInfo(f"archive/{name}")
        # Padding as an extra field of a private kind, so that storages start at multiples of 64 bytes as torch has it.
        zip64 = 20 if len(content) > zipfile.ZIP64_LIMIT // 2 else 0
        start = self._file.tell() + 30 + len(info.filename) + zip64 + 4
        padding = -start % _ALIGNMENT
        info.extra = b"\x46\x42" + padding.to_bytes(2, "little") + b"Z" * padding
        info.file_size = len(content)
        with self._archive.open(info, "w", force_zip64=bool(zip64)) as member:
            view = memoryview(content).cast("B")
            for at in range(0, len(view), 1 << 24):
                member.write(view[at : at + (1 << 24)])
