# SPDX-License-Identifier: Apache-2.0
"""The file ``.metadata`` of a directory of torch.distributed.checkpoint: what blocks there are, and where they lie.

It is a pickle of torch's own classes. Importing them takes a quarter of the time in which a command starts, and they
are needed for nothing else: their names are written without them. Torch reads the file as one of its own.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

_PACKAGE = "torch.distributed.checkpoint"
#: Of the format.
_VERSION = "1.0.0"


class _MemoryFormat:
    def __reduce__(self) -> tuple[Any, ...]:
        return _MemoryFormat, (0,)  # contiguous


@dataclass
class TensorProperties:
    """The type of a tensor's elements, and how it lies in memory."""

    dtype: torch.dtype

    def __getstate__(self) -> tuple[Any, ...]:
        return self.dtype, torch.strided, False, _MemoryFormat(), False  # needs no gradient, is not pinned


@dataclass
class ChunkStorageMetadata:
    """Where a block of a tensor lies in the whole of it."""

    offsets: torch.Size
    sizes: torch.Size


@dataclass
class TensorStorageMetadata:
    """A tensor and its blocks."""

    properties: TensorProperties
    size: torch.Size
    chunks: list[ChunkStorageMetadata]


@dataclass(frozen=True)
class MetadataIndex:
    """A block by its tensor's name and its offsets; ``index`` is its number among the tensor's blocks."""

    fqn: str
    offset: torch.Size
    index: int = field(compare=False)


@dataclass
class StorageInfo:
    """Where the bytes of a block lie."""

    relative_path: str
    offset: int
    length: int


@dataclass
class Metadata:
    """All tensors by name, and where each of their blocks lies.

    Attributes:
        planner_data: by name, the keys that lead to the tensor in nested dictionaries.
    """

    state_dict_metadata: dict[str, TensorStorageMetadata]
    planner_data: dict[str, tuple[str, ...]]
    storage_data: dict[MetadataIndex, StorageInfo]
    storage_meta: None = None
    version: str = _VERSION

    def dump(self) -> bytes:
        """The content of the file."""
        file = io.BytesIO()
        _Pickler(file, protocol=4).dump(self)
        return file.getvalue()


#: Module and name of torch's classes.
_NAMES: Mapping[type, tuple[str, str]] = {
    **{
        kind: (f"{_PACKAGE}.metadata", kind.__name__)
        for kind in (TensorProperties, ChunkStorageMetadata, TensorStorageMetadata, MetadataIndex, Metadata)
    },
    _MemoryFormat: (f"{_PACKAGE}.metadata", "_MEM_FORMAT_ENCODING"),
    StorageInfo: (f"{_PACKAGE}.filesystem", "_StorageInfo"),
}


#: The one in Python, which can be taught to write the name of a class that is not there; stubs leave out what it has.
_PythonPickler: Any = pickle._Pickler


class _Pickler(_PythonPickler):
    """Writes torch's names of the classes above."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if not (isinstance(obj, type) and obj in _NAMES):
            super().save_global(obj, name)
            return
        for text in _NAMES[obj]:
            self.save(text)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)
