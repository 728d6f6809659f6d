# SPDX-License-Identifier: Apache-2.0
"""Directories of torch.distributed.checkpoint, read and written one tensor at a time.

Torch's own reader loads ``.metadata`` with an unrestricted pickle, and its writer keeps every tensor of a file in
memory until the file is finished. Both matter here, so the format, which is small, is read and written directly: a
pickle that says where the blocks of every tensor lie, and files that hold each block as ``torch.save`` writes it.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
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
from megatron_bert.convert.state import StateTensor
from parallel.errors import UserError, brief
from parallel.manifest import Manifest
from parallel.stored.distributed_files import LARGE, METADATA, BlockedTensor, files_of, read_block, read_metadata
from parallel.stored.pickles import PLAIN

_DATA = "__0_0.distcp"


# ---------------------------------------------------------------- reading


def read_distributed(tree: FileTree, manifest: Manifest | None) -> dict[str, StateTensor]:
    """The tensors of a directory, unread; they are compared with the checksums of a manifest as they are read.

    Raises:
        UserError: the metadata is damaged, asks to load something else than data, or speaks of files or blocks that are
            not there.
    """
    metadata = replace(tree[METADATA], label=f"{tree.label}/{METADATA}")
    tensors = read_metadata(metadata, PLAIN if tree.folder is None else LARGE)
    for tensor in tensors.values():
        for block in tensor.blocks:
            if block.file not in tree:
                raise UserError(
                    f"{tree.label} lacks {brief(block.file)}, which holds {brief(tensor.name)}: copy all files of the "
                    "checkpoint"
                )
    lengths = {file: tree[file].length for file in files_of(tensors.values())}
    for tensor in tensors.values():
        for block in tensor.blocks:
            if not 0 <= block.start <= lengths[block.file] - block.length:
                tree[block.file].part(block.start, block.length)  # says how it is damaged
    return {
        name: StateTensor(
            tensor.shape, tensor.dtype, partial(_assemble, tree, tensor, manifest), f"{tree.label}: {brief(name)}"
        )
        for name, tensor in tensors.items()
    }


def _assemble(tree: FileTree, tensor: BlockedTensor, manifest: Manifest | None) -> Tensor:
    whole: Tensor | None = None
    for block in tensor.blocks:
        if manifest is not None:
            manifest.check_range(block.file, block.start, block.length)
        place = tree[block.file].part(block.start, block.length)
        values = read_block(place, tensor, block, (0,) * len(block.sizes), block.sizes)
        if block.sizes == tensor.shape:
            return values
        if whole is None:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        whole[tuple(slice(o, o + s) for o, s in zip(block.offsets, block.sizes))] = values
    return torch.empty(tensor.shape, dtype=tensor.dtype) if whole is None else whole


# ---------------------------------------------------------------- writing


def write_distributed(target: Path, tensors: Mapping[str, StateTensor]) -> None:
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
    metadata = Metadata(described, planner_data={name: (name,) for name in tensors}, storage_data=places)
    with (target / METADATA).open("wb") as file:
        pickle.dump(metadata, file)
