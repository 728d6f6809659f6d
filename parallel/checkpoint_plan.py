# SPDX-License-Identifier: Apache-2.0
"""Which rank writes which part of a checkpoint, and where: decided once, for all saves of the same tensors.

Every byte is written once: what several ranks hold goes to the one of them that has the least to write. The plan is
the one that torch.distributed.checkpoint, whose files these are, would make; sizes and places follow from it before
anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.file_process import Piece
from parallel.object_collectives import gather_on_first
from parallel.parts import Part, Region, Sizes
from parallel.stored.distributed_files import covers
from parallel.stored.distributed_metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageInfo,
    TensorProperties,
    TensorStorageMetadata,
)
from parallel.stored.torch_archive import tensor_archive

#: Values are staged at multiples of this, for every type of element.
_ALIGNMENT = 64

#: A block: the global name of its tensor, and its offsets there.
_Key = tuple[str, Sizes]


@dataclass(frozen=True)
class WritePlan:
    """What one rank writes of every checkpoint.

    Attributes:
        file: its name; None where the rank writes nothing.
        blocks: global names and offsets of the blocks that are written, in the order of the file.
        pieces: where their values are staged, and what is written around them.
        metadata: content of the file ``.metadata``, on rank 0; else None.
    """

    file: str | None
    blocks: tuple[tuple[str, Sizes], ...]
    pieces: tuple[Piece, ...]
    metadata: bytes | None

    @property
    def staged_bytes(self) -> int:
        """Memory that a copy of the values takes."""
        return _aligned(self.pieces[-1].start + self.pieces[-1].nbytes) if self.pieces else 0


def signature(tensors: Mapping[str, Tensor | Part]) -> dict[str, Any]:
    """What a plan depends on."""
    parts = {name: Part.of(tensor) for name, tensor in tensors.items()}
    return {name: (part.shape, part.dtype, part.regions, part.axes) for name, part in parts.items()}


@dataclass(frozen=True)
class HeldTensor:
    """What one rank has of a tensor, whether or not others have it as well.

    Attributes:
        name: of the tensor in checkpoints.
        shape: of the whole tensor.
        dtype: of its elements.
        regions: the blocks of it that this rank has.
    """

    name: str
    shape: Sizes
    dtype: torch.dtype
    regions: tuple[Region, ...]


def local_plan(tensors: Mapping[str, Tensor | Part]) -> list[HeldTensor]:
    """What this rank has."""
    parts = {name: Part.of(tensor) for name, tensor in tensors.items()}
    return [HeldTensor(name, part.shape, part.dtype, part.regions) for name, part in parts.items()]


def global_plans(local: list[list[HeldTensor]]) -> list[WritePlan]:
    """What each rank writes, of what each has.

    Raises:
        ValueError: the ranks do not have every element of a tensor, or blocks of it overlap.
    """
    holders: dict[_Key, list[int]] = {}
    blocks: dict[_Key, tuple[HeldTensor, Sizes]] = {}
    for rank, held in enumerate(local):
        for tensor in held:
            for offsets, sizes in tensor.regions:
                holders.setdefault((tensor.name, offsets), []).append(rank)
                blocks[tensor.name, offsets] = tensor, sizes
    _check_whole(blocks)
    writer: dict[_Key, int] = {}
    load = [0] * len(local)
    for key, ranks in holders.items():
        writer[key] = rank = min(ranks, key=load.__getitem__)
        tensor, sizes = blocks[key]
        load[rank] += math.prod(sizes) * tensor.dtype.itemsize or 1
    metadata = Metadata({}, {tensor.name: (tensor.name,) for held in local for tensor in held}, {})
    plans = []
    for rank, held in enumerate(local):
        keys = [(tensor.name, offsets) for tensor in held for offsets, _ in tensor.regions]
        plans.append(_write_plan(rank, [key for key in keys if writer[key] == rank], blocks))
        _enter(plans[-1], blocks, metadata)
    return [replace(plans[0], metadata=metadata.dump()), *plans[1:]]


def _check_whole(blocks: Mapping[_Key, tuple[HeldTensor, Sizes]]) -> None:
    """Each element of each tensor is in one block."""
    regions: dict[str, list[Region]] = {}
    for (name, offsets), (_, sizes) in blocks.items():
        regions.setdefault(name, []).append((offsets, sizes))
    shapes = {tensor.name: tensor.shape for tensor, _ in blocks.values()}
    for name, found in regions.items():
        if not covers(found, shapes[name]):
            raise ValueError(f"the blocks that ranks have of {name} do not make it up: {found} of {shapes[name]}")


def _write_plan(rank: int, keys: list[_Key], blocks: Mapping[_Key, tuple[HeldTensor, Sizes]]) -> WritePlan:
    pieces: list[Piece] = []
    start = 0
    for key in keys:
        tensor, sizes = blocks[key]
        pieces.append(tensor_archive(sizes, tensor.dtype, start))
        start = _aligned(start + pieces[-1].nbytes)
    return WritePlan(f"__{rank}_0.distcp" if pieces else None, tuple(keys), tuple(pieces), None)


def _enter(plan: WritePlan, blocks: Mapping[_Key, tuple[HeldTensor, Sizes]], metadata: Metadata) -> None:
    """Add what a rank writes to the metadata."""
    position = 0
    for key, piece in zip(plan.blocks, plan.pieces, strict=True):
        tensor, sizes = blocks[key]
        entry = metadata.state_dict_metadata.setdefault(
            tensor.name, TensorStorageMetadata(TensorProperties(tensor.dtype), torch.Size(tensor.shape), [])
        )
        chunk = ChunkStorageMetadata(torch.Size(key[1]), torch.Size(sizes))
        assert plan.file is not None
        index = MetadataIndex(tensor.name, chunk.offsets, len(entry.chunks))
        metadata.storage_data[index] = StorageInfo(plan.file, position, piece.length)
        entry.chunks.append(chunk)
        position += piece.length


def plan_writing(tensors: Mapping[str, Tensor | Part]) -> WritePlan:
    """What this rank writes of the checkpoints of a run; every rank calls."""
    size, first = dist.get_world_size(), dist.get_rank() == 0
    local = gather_on_first(local_plan(tensors))
    answer: list[Any] = [None]
    answers: list[Any] = [None] * size
    if first:
        try:
            answers = list(global_plans(local))
        except ValueError as error:  # which the others would wait for
            answers = [error] * size
    dist.scatter_object_list(answer, answers if first else None)
    (mine,) = answer
    if isinstance(mine, ValueError):
        raise mine
    assert isinstance(mine, WritePlan)
    for (name, offsets), piece in zip(mine.blocks, mine.pieces, strict=True):
        assert Part.of(tensors[name]).block(offsets).nbytes == piece.nbytes, name
    return mine


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
