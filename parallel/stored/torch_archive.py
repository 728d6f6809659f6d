# SPDX-License-Identifier: Apache-2.0
"""Files of ``torch.save``, written without having all tensors: zip archives without compression.

All of a file of one tensor but the checksum of the values follows from shape and type, so a writer that has no torch
can put it together, and the size of a checkpoint's files is known in advance. A file of many tensors is written one
tensor at a time, where ``torch.save`` takes them all at once.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parallel.file_process import Piece
from parallel.stored.torch_vocabulary import STORAGE_CLASSES

_ALIGNMENT = 64
_LONG = 0xFFFFFFFF
#: 1 January 1980, the earliest date that the format knows: the same tensors make the same bytes.
_DATE = 0x21


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in a structure to be saved; its values are given later, by its name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage:
    slot: Slot
    key: str


def tensor_archive(shape: tuple[int, ...], dtype: torch.dtype, start: int = 0) -> Piece:
    """What ``torch.save`` would put around the values of a contiguous tensor.

    Args:
        start: offset of the values in the memory from which they are written.
    """
    pickled, _ = _pickle_structure(Slot("tensor", shape, dtype))
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    head, entries = bytearray(), bytearray()
    members = (("data.pkl", pickled), ("version", b"3\n"), ("byteorder", b"little"), ("data/0", None))
    for name, content in members:
        size = nbytes if content is None else len(content)
        at = len(head)
        local, entry = _records(f"archive/{name}".encode(), at, size, zlib.crc32(content or b""))
        head += local
        entries += entry
        if content is not None:
            head += content
    # Of the values' records, which come last, the CRC-32 is at a fixed offset.
    tail = bytes(entries) + _end(len(members), len(entries), len(head) + nbytes)
    return Piece(start, nbytes, bytes(head), tail, at + 14, len(entries) - len(entry) + 16)


@contextmanager
def torch_file(path: Path, structure: Any) -> Iterator[Callable[[str, memoryview], None]]:
    """A new file of torch.save, open for its tensors; yields what gives the values of a slot, each once.

    Args:
        structure: what torch.load will return, with a :class:`Slot` for every tensor.
    """
    pickled, keys = _pickle_structure(structure)
    entries: list[bytes] = []

    def member(name: str, content: bytes | memoryview) -> None:
        local, entry = _records(f"archive/{name}".encode(), file.tell(), len(content), zlib.crc32(content))
        entries.append(entry)
        file.write(local)
        file.write(content)

    with path.open("xb") as file:
        for name, content in (("data.pkl", pickled), ("version", b"3\n"), ("byteorder", b"little")):
            member(name, content)
        yield lambda name, values: member(f"data/{keys.pop(name)}", values)
        assert not keys, f"no values were given for {sorted(keys)[:3]}"
        directory = b"".join(entries)
        file.write(directory + _end(len(entries), len(directory), file.tell()))


def _records(name: bytes, start: int, size: int, crc: int) -> tuple[bytes, bytes]:
    """A member's header, behind which its content starts at a multiple of 64 bytes, and its entry in the directory."""
    sizes = struct.pack("<QQ", size, size) if size >= _LONG else b""
    place = struct.pack("<Q", start) if start >= _LONG else b""
    shown, version = (_LONG, 45) if sizes else (size, 20)
    here, listed = (struct.pack("<HH", 1, len(large)) + large if large else b"" for large in (sizes, sizes + place))
    padding = -(start + 30 + len(name) + len(here) + 4) % _ALIGNMENT
    extra = here + b"\x46\x42" + padding.to_bytes(2, "little") + b"Z" * padding
    common = (0, 0, 0, _DATE, crc, shown, shown, len(name))
    local = struct.pack("<IHHHHHIIIHH", 0x04034B50, version, *common, len(extra)) + name + extra
    ends = (len(listed), 0, 0, 0, 0, min(start, _LONG))
    entry = struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, version, version, *common, *ends)
    return local, entry + name + listed


def _end(count: int, size: int, start: int) -> bytes:
    """The end of the archive: number of entries, and the size and place of the directory."""
    last = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, size, min(start, _LONG), 0)
    if start < _LONG:
        return last
    large = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, start)
    return large + struct.pack("<IIQI", 0x07064B50, 0, start + size, 1) + last


def _pickle_structure(structure: Any) -> tuple[bytes, dict[str, str]]:
    """The pickle of a structure with a :class:`Slot` for every tensor, and the key of the storage of every slot."""
    keys: dict[str, str] = {}
    file = io.BytesIO()
    _Pickler(file, keys).dump(structure)
    return file.getvalue(), keys


class _Pickler(pickle.Pickler):
    """Writes tensors as torch does: a call of its rebuild function on a persistent id."""

    def __init__(self, file: io.BytesIO, keys: dict[str, str]) -> None:
        super().__init__(file, protocol=2)
        self._keys = keys

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Slot):
            return NotImplemented
        storage = _Storage(value, self._keys.setdefault(value.name, str(len(self._keys))))
        stride = torch.empty(value.shape, device="meta").stride()
        # Five arguments and no hooks: what torch of any age accepts.
        return torch._utils._rebuild_tensor_v2, (storage, 0, value.shape, stride, False, {})

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        return ("storage", STORAGE_CLASSES[value.slot.dtype], value.key, "cpu", math.prod(value.slot.shape))
