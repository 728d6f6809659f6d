"""Directories of torch.distributed.checkpoint, read and written one tensor at a time.

Torch's own reader loads ``.metadata`` with an unrestricted pickle, and its writer keeps every tensor of a file in
memory until the file is finished. Both matter here, so the format, which is small, is read and written directly: a
pickle that says where the blocks of every tensor lie, and files that hold each block as ``torch.save`` writes it.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_bert.convert.files import FileTree
from megatron_bert.convert.progress import Progress
from megatron_bert.convert.state import StateTensor
from parallel.errors import UserError, brief
from parallel.stored.file_range import FileRange
from parallel.stored.pickles import load_pickle
from parallel.stored.stored_tensor import StoredTensor
from parallel.stored.torch_files import load_torch_file
from parallel.stored.torch_vocabulary import DTYPE_VALUES
from parallel.stored.vocabulary import StandIn, Vocabulary

METADATA = ".metadata"
_DATA = "__0_0.distcp"


@dataclass(frozen=True)
class _Chunk:
    """A block of a tensor.

    Attributes:
        offsets: of its first element in the tensor.
        sizes: of the block.
        place: the file of torch.save that holds it.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: FileRange


# ---------------------------------------------------------------- reading


def read_distributed(tree: FileTree) -> dict[str, StateTensor]:
    """The tensors of a directory, unread.

    Raises:
        UserError: the metadata is damaged, asks to load something else than data, or speaks of files or blocks that are
            not there.
    """
    label = f"{tree.label}/{METADATA}"
    vocabulary = Vocabulary(
        values=DTYPE_VALUES,
        calls={"torch.Size": lambda sizes=(): tuple(sizes)},
        inert=("torch.distributed.checkpoint.", "torch.serialization._get_layout", "pathlib."),
    )
    with tree[METADATA].open() as file:
        root = load_pickle(file, vocabulary, label)
    try:
        tensors = _attribute(root, "state_dict_metadata")
        places = {}
        for index, info in _attribute(root, "storage_data").items():
            if isinstance(index, StandIn) and isinstance(info, StandIn):
                state = index.state
                places[state["fqn"], state.get("offset")] = info.state
        found = {}
        for name, entry in tensors.items():
            if entry.kind.name != "TensorStorageMetadata":
                continue
            found[str(name)] = _state_tensor(tree, str(name), entry.state, places)
        return found
    except UserError:
        raise
    # Values of any kind can stand anywhere in a damaged file.
    except Exception as error:
        raise UserError(f"{label} is damaged ({type(error).__name__}): use another checkpoint") from None


def _attribute(value: Any, name: str) -> Any:
    found = value.state[name]
    if not isinstance(found, dict):
        raise TypeError(name)
    return found


def _state_tensor(tree: FileTree, name: str, state: Any, places: Mapping[Any, Any]) -> StateTensor:
    shape, dtype = _sizes(state["size"]), state["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError("dtype")
    chunks = []
    for entry in state["chunks"]:
        offsets, sizes = _sizes(entry.state["offsets"]), _sizes(entry.state["sizes"])
        if len(offsets) != len(shape) or any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            raise ValueError("a block outside its tensor")
        info = places[name, offsets]
        file = info["relative_path"]
        if not isinstance(file, str) or "/" in file or file not in tree:
            raise UserError(
                f"{tree.label} lacks {brief(file)}, which holds {brief(name)}: copy all files of the checkpoint"
            )
        place = tree[file].part(info["offset"], info["length"])
        if math.prod(sizes) * dtype.itemsize > place.length:
            raise ValueError("a block larger than its bytes")
        chunks.append(_Chunk(offsets, sizes, place))
    if sum(math.prod(chunk.sizes) for chunk in chunks) < math.prod(shape):
        raise UserError(f"{tree.label} holds only a part of {brief(name)}: it was not written to its end; use another")
    return StateTensor(shape, dtype, lambda: _assemble(name, shape, dtype, chunks), f"{tree.label}: {brief(name)}")


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(n) is int and 0 <= n < 1 << 48 for n in value):
        raise ValueError("sizes")
    return value


def _assemble(name: str, shape: tuple[int, ...], dtype: torch.dtype, chunks: list[_Chunk]) -> Tensor:
    whole: Tensor | None = None
    for chunk in chunks:
        stored = load_torch_file(chunk.place)
        if not isinstance(stored, StoredTensor) or stored.shape != chunk.sizes or stored.dtype != dtype:
            raise UserError(f"{chunk.place.label} is damaged: a block of {brief(name)} is not what it should be")
        block = stored.load()
        if chunk.sizes == shape:
            return block
        if whole is None:
            whole = torch.empty(shape, dtype=dtype)
        whole[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes))] = block
    return torch.empty(shape, dtype=dtype) if whole is None else whole


# ---------------------------------------------------------------- writing


def write_distributed(target: Path, tensors: Mapping[str, StateTensor], progress: Progress) -> None:
    """Write tensors into a folder as torch.distributed.checkpoint does from a single process."""
    described: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    with (target / _DATA).open("wb") as file:
        for name, tensor in tensors.items():
            size = torch.Size(tensor.shape)
            zeros = torch.Size([0] * len(size))
            start = file.tell()
            values = tensor.load()
            # torch.save writes the whole memory behind a view.
            torch.save(values.clone() if values.untyped_storage().nbytes() != values.nbytes else values, file)
            places[MetadataIndex(name, zeros)] = _StorageInfo(_DATA, start, file.tell() - start)
            described[name] = TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype), size, [ChunkStorageMetadata(zeros, size)]
            )
            progress.advance(tensor.nbytes)
    metadata = Metadata(described, planner_data={name: (name,) for name in tensors}, storage_data=places)
    with (target / METADATA).open("wb") as file:
        pickle.dump(metadata, file)
