# SPDX-License-Identifier: Apache-2.0
"""Pickles of structures with tensors, as ``torch.save`` writes them, made without the tensors."""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import dataclass
from typing import Any

import torch

#: Class of the storage, in a pickle, of the elements of each type.
STORAGE_CLASSES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


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


def pickle_structure(structure: Any) -> tuple[bytes, dict[str, str]]:
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
