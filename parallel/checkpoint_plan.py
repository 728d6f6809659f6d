# SPDX-License-Identifier: Apache-2.0
"""Which rank writes which part of a checkpoint, and where: decided once, for all saves of the same tensors.

Every byte is written once: what several ranks hold goes to the one of them that has the least to write. The plan is
torch.distributed.checkpoint's, whose files these are; sizes and places follow from it before anything is written.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.file_process import Piece
from parallel.object_collectives import gather_on_first
from parallel.parts import Part, Region, Sizes
from parallel.stored.torch_archive import tensor_archive

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import SavePlan

#: Values are staged at multiples of this, for every type of element.
_ALIGNMENT = 64


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
    """What each rank writes, of what each has."""
    # One rank alone pays for these imports, a quarter of the time in which a command starts.
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo

    plans, metadata = DefaultSavePlanner().create_global_plan([_save_plan(held) for held in local])
    found = [_write_plan(rank, plan) for rank, plan in enumerate(plans)]
    metadata.version = CURRENT_DCP_VERSION
    metadata.storage_data = {}
    for plan, write in zip(plans, found, strict=True):
        offset = 0
        for item, piece in zip(plan.items, write.pieces, strict=True):
            assert write.file is not None
            metadata.storage_data[item.index] = _StorageInfo(write.file, offset, piece.length)
            offset += piece.length
    return [replace(found[0], metadata=pickle.dumps(metadata)), *found[1:]]


def _save_plan(held: list[HeldTensor]) -> SavePlan:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    items = []
    for tensor in held:
        for region in tensor.regions:
            chunk = ChunkStorageMetadata(*map(torch.Size, region))
            data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape))
            items.append(WriteItem(MetadataIndex(tensor.name, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
    return SavePlan(items, planner_data={tensor.name: (tensor.name,) for tensor in held})


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


def _write_plan(rank: int, plan: SavePlan) -> WritePlan:
    blocks: list[tuple[str, Sizes]] = []
    pieces: list[Piece] = []
    start = 0
    for item in plan.items:
        data = item.tensor_data
        assert data is not None, f"{item.index.fqn} is not a tensor"
        blocks.append((item.index.fqn, tuple(data.chunk.offsets)))
        pieces.append(tensor_archive(tuple(data.chunk.sizes), data.properties.dtype, start))
        start = _aligned(start + pieces[-1].nbytes)
    return WritePlan(f"__{rank}_0.distcp" if pieces else None, tuple(blocks), tuple(pieces), None)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
