# SPDX-License-Identifier: Apache-2.0
"""Safetensors files, mapped and written one tensor at a time.

The library writes a file from tensors that are all in memory, and maps one whole, which counts as memory of the process
until it is closed. The format is a JSON header and bytes, so both are few lines here; the library reads the result.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_bert.convert.state import StateTensor, bytes_of
from megatron_bert.json_file import parse_object
from parallel.errors import UserError, brief
from parallel.stored.file_range import FileRange
from parallel.stored.strange_files import refuse_strange

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100 << 20


def read_safetensors(place: FileRange) -> dict[str, StateTensor]:
    """The tensors of a file, unread.

    Raises:
        UserError: its header is damaged, or says more than the file holds.
    """
    damaged = f"{place.label} is a damaged safetensors file"
    (length,) = struct.unpack("<Q", place.read(0, 8)) if place.length >= 8 else (0,)
    if not 2 <= length <= min(_LONGEST_HEADER, place.length - 8):
        refuse_strange(place)
        raise UserError(f"{damaged}: its header is cut off; fetch it again")
    header = parse_object(bytes(place.read(8, length)), f"the header of {place.label}")
    data = place.part(8 + length, place.length - 8 - length)
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor = _entry(data, name, entry)
        if tensor is None:
            raise UserError(f"{damaged}: its header gives {brief(name)} no place inside the file; fetch it again")
        found[name] = tensor
    return found


def _entry(data: FileRange, name: str, entry: object) -> StateTensor | None:
    if not isinstance(entry, dict):
        return None
    dtype, shape, offsets = _DTYPES.get(str(entry.get("dtype"))), entry.get("shape"), entry.get("data_offsets")
    if dtype is None or not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return None
    if len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 48 for n in (*shape, *offsets)):
        return None
    start, end = offsets
    if not start <= end <= data.length or end - start != math.prod(shape) * dtype.itemsize:
        return None

    def load() -> Tensor:
        if start == end:
            return torch.empty(shape, dtype=dtype)
        aligned = (data.start + start) % dtype.itemsize == 0
        values = data.map(start, end - start) if aligned else data.read(start, end - start)
        return torch.frombuffer(values, dtype=dtype).view(shape)

    return StateTensor(tuple(shape), dtype, load, f"{data.label}: {brief(name)}")


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], values: Iterable[Tensor]
) -> None:
    """Write a file of tensors, of which one at a time is in memory.

    Args:
        path: of the file, which must not be there.
        tensors: name -> (shape, dtype).
        values: of the tensors, in their order.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in tensors.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, described), tensor in zip(tensors.items(), values, strict=True):
            assert described == (tensor.shape, tensor.dtype), f"{name} is not as it was described"
            file.write(bytes_of(tensor))
