"""Which rank writes which part of a checkpoint, and where: decided once, for all saves of the same tensors.

Every byte is written once: what several ranks hold goes to the one of them that has the least to write. The plan is
torch.distributed.checkpoint's, whose files these are; sizes and places follow from it before anything is written.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from parallel.file_process import Piece
from parallel.stored.torch_archive import tensor_archive

#: Values are staged at multiples of this, for every type of element.
_ALIGNMENT = 64


@dataclass(frozen=True)
class WritePlan:
    """What one rank writes of every checkpoint.

    Attributes:
        file: its name; None where the rank writes nothing.
        names: global names of the tensors whose local part is written, in the order of the file.
        pieces: where their values are staged, and what is written around them.
        metadata: content of the file ``.metadata``, on rank 0; else None.
    """

    file: str | None
    names: tuple[str, ...]
    pieces: tuple[Piece, ...]
    metadata: bytes | None

    @property
    def file_bytes(self) -> int:
        """Size of the rank's file."""
        return sum(piece.length for piece in self.pieces)

    @property
    def staged_bytes(self) -> int:
        """Memory that a copy of the values takes."""
        return _aligned(self.pieces[-1].start + self.pieces[-1].nbytes) if self.pieces else 0


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def signature(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a plan depends on."""
    return {
        name: (tensor.shape, tensor.dtype, local_part(tensor).shape, getattr(tensor, "placements", None))
        for name, tensor in tensors.items()
    }


def local_plan(tensors: Mapping[str, Tensor]) -> SavePlan:
    """What this rank has, whether or not others have it as well."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(dict(tensors), is_coordinator=True)
    return planner.create_local_plan()


def global_plans(local: list[SavePlan]) -> list[WritePlan]:
    """What each rank writes.

    Args:
        local: what each rank has.
    """
    plans, metadata = DefaultSavePlanner().create_global_plan(local)
    found = [_write_plan(rank, plan) for rank, plan in enumerate(plans)]
    metadata.version = CURRENT_DCP_VERSION
    metadata.storage_data = {
        index: info for plan, write in zip(plans, found, strict=True) for index, info in _places(plan, write)
    }
    first = found[0]
    found[0] = WritePlan(first.file, first.names, first.pieces, pickle.dumps(metadata))
    return found


def plan_writing(tensors: Mapping[str, Tensor]) -> WritePlan:
    """What this rank writes of the checkpoints of a run; every rank calls."""
    size, first = dist.get_world_size(), dist.get_rank() == 0
    local: list[Any] = [None] * size
    dist.gather_object(local_plan(tensors), local if first else None)
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
    for name, piece in zip(mine.names, mine.pieces, strict=True):
        assert local_part(tensors[name]).nbytes == piece.nbytes, name
    return mine


def _write_plan(rank: int, plan: SavePlan) -> WritePlan:
    pieces: list[Piece] = []
    start = 0
    for item in plan.items:
        data = item.tensor_data
        assert data is not None, f"{item.index.fqn} is no tensor"
        pieces.append(tensor_archive(tuple(data.chunk.sizes), data.properties.dtype, start))
        start = _aligned(start + pieces[-1].nbytes)
    file = f"__{rank}_0.distcp" if pieces else None
    return WritePlan(file, tuple(item.index.fqn for item in plan.items), tuple(pieces), None)


def _places(plan: SavePlan, write: WritePlan) -> list[tuple[Any, _StorageInfo]]:
    places, offset = [], 0
    for item, piece in zip(plan.items, write.pieces, strict=True):
        assert write.file is not None
        places.append((item.index, _StorageInfo(write.file, offset, piece.length)))
        offset += piece.length
    return places


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
