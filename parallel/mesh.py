# SPDX-License-Identifier: Apache-2.0
"""The layout of a run over its processes: sizes of the axes, the device mesh, and this rank's place in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from parallel.errors import ArgumentError, UserError
from parallel.process_group import own_group

#: Mesh axes from slowest to fastest varying rank: tensor groups are neighbors, as in Megatron-LM's rank order.
AXES = ("pipeline", "data_replicate", "data_shard", "tensor")
DATA_AXES = ("data_replicate", "data_shard")
#: What is divided over the data ranks; see :func:`data_shard_size`.
Sharding = Literal["none", "optimizer", "full", "hybrid"]


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """How many ways each axis divides the work.

    Attributes:
        tensor: ranks that share every layer's matrices.
        pipeline: ranks that share the stack of layers.
        data: ranks (times the above) that share the batch.
        data_shard: of the data ranks, how many share one sharded copy of parameters, gradients and optimizer
            states; data / data_shard copies are kept. 1 replicates everything.
        sequence: whether activations outside the matrices are divided over the tensor ranks by token.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    data_shard: int = 1
    sequence: bool = False

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "data", "data_shard"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"${name} is {getattr(self, name)}: give 1 or more")
        if self.data % self.data_shard:
            raise UserError(
                f"{self.data} data-parallel ranks cannot be divided in shard groups of {self.data_shard}: "
                "choose a shard size that divides the data-parallel size"
            )
        if self.sequence and self.tensor == 1:
            raise ArgumentError("$sequence=true needs $tensor of 2 or more: it divides tokens over tensor ranks")

    @property
    def world_size(self) -> int:
        """Number of processes the layout takes."""
        return self.tensor * self.pipeline * self.data

    @property
    def data_replicate(self) -> int:
        """Number of complete copies of the model state over the data axis."""
        return self.data // self.data_shard

    @property
    def split_tokens(self) -> int:
        """Ranks that divide the tokens between matrix products."""
        return self.tensor if self.sequence else 1


def data_shard_size(sharding: Sharding, data: int, hybrid_size: int | None) -> int:
    """How many data ranks share one copy of the model state under a sharding setting.

    Args:
        sharding: ``none`` keeps a copy on each rank; ``optimizer`` and ``full`` share one over all; ``hybrid`` shares
            one over ``hybrid_size`` neighbors (a node) and copies it between them.
    """
    if sharding == "none":
        return 1
    if sharding == "hybrid":
        assert hybrid_size is not None, "hybrid sharding comes with its size: settings are checked before"
        return hybrid_size
    return data


def fit_data_size(
    world_size: int, *, tensor: int, pipeline: int, data: int | None = None, choices: list[int] | None = None
) -> int:
    """The data-parallel size that makes tensor x pipeline x data the world size, or with choices at most that.

    Args:
        data: the size asked for, or None for whatever is left.
        choices: sizes to choose the largest of that fits, with data as the most; None for one that fits exactly.

    Raises:
        UserError: the sizes do not multiply to the world size, or no choice fits in it.
    """
    model = tensor * pipeline
    if choices is not None:
        most = min(world_size // model, data or world_size)
        fitting = [size for size in choices if size <= most]
        if not fitting:
            least = f"at least {min(choices) * model}" if choices else "none"
            raise UserError(
                f"{world_size} processes are too few for tensor {tensor} x pipeline {pipeline} x a data size that the "
                f"batch allows: {least} would do; wait for more hosts, or start on a smaller layout, which loads the "
                "same checkpoints"
            )
        return max(fitting)
    if data is None:
        if world_size % model:
            raise ArgumentError(
                f"tensor {tensor} x pipeline {pipeline} = {model} does not divide the {world_size} processes started: "
                f"start a multiple of {model}, or change $tensor / $pipeline"
            )
        return world_size // model
    if model * data != world_size:
        raise ArgumentError(
            f"tensor {tensor} x pipeline {pipeline} x data {data} = {model * data}, but {world_size} processes were "
            f"started: start {model * data}, or leave $data unset to use what is there"
        )
    return data


@dataclass(frozen=True)
class TensorParallel:
    """One rank's view of its tensor-parallel group; the default is a world of one.

    Attributes:
        rank: place in the group, 0 to size - 1.
        size: ranks in the group.
        sequence: whether activations between the matrices are divided by token (sequence parallelism,
            Korthikanti et al., arXiv 2205.05198).
        mesh: the one-dimensional device mesh of the group; None when size is 1.
    """

    rank: int = 0
    size: int = 1
    sequence: bool = False
    mesh: DeviceMesh | None = field(default=None, compare=False, repr=False)

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group; only asked for when size is above 1."""
        assert self.mesh is not None, "a tensor-parallel group of size 1 has no process group"
        return self.mesh.get_group()

    @property
    def group_name(self) -> str:
        """The group's registered name, which functional collectives (and compiled graphs) refer to."""
        return "" if self.mesh is None else self.group.group_name


#: The handle of a model that is not tensor parallel.
SINGLE = TensorParallel()


class ParallelMesh:
    """A layout laid over the processes of a run.

    Every rank constructs it at the same point, with the same layout: the groups are created collectively.
    """

    def __init__(self, layout: ParallelLayout, device: torch.device) -> None:
        if dist.get_world_size() != layout.world_size:
            raise UserError(
                f"{layout} takes {layout.world_size} processes, but {dist.get_world_size()} were started: "
                f"start {layout.world_size}, or change the layout"
            )
        self.layout = layout
        self.device = device
        shape = (layout.pipeline, layout.data_replicate, layout.data_shard, layout.tensor)
        ranks = torch.arange(layout.world_size).view(shape)
        # Groups of our own rather than those a mesh makes, which would ignore the run's timeout.
        lines = (ranks.movedim(dim, -1).reshape(-1, size).tolist() for dim, size in enumerate(shape))
        groups = [group for group in map(own_group, lines) if group is not None]  # a line of every dimension
        self.device_mesh = DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=AXES)
        self.coordinate: dict[str, int] = {axis: self.device_mesh.get_local_rank(axis) for axis in AXES}
        self.size: dict[str, int] = {axis: self.device_mesh.size(i) for i, axis in enumerate(AXES)}
        #: The global ranks of every pipeline, first stage first.
        self.pipelines: list[list[int]] = ranks.flatten(1).t().tolist()

    def __repr__(self) -> str:
        """Rank and coordinates, as failures are read by them."""
        place = ", ".join(f"{axis} {self.coordinate[axis]}/{self.size[axis]}" for axis in AXES)
        return f"ParallelMesh(rank {dist.get_rank()}: {place})"

    @property
    def data_rank(self) -> int:
        """Place of this rank on the data axis, 0 to data - 1."""
        return self.coordinate["data_replicate"] * self.layout.data_shard + self.coordinate["data_shard"]

    @cached_property
    def tensor_parallel(self) -> TensorParallel:
        """The handle that tensor-parallel layers take: always the same, which compiled code asks for."""
        if self.layout.tensor == 1:
            return SINGLE
        return TensorParallel(
            rank=self.coordinate["tensor"],
            size=self.layout.tensor,
            sequence=self.layout.sequence,
            mesh=self.device_mesh["tensor"],
        )

    def data_mesh(self) -> DeviceMesh:
        """The mesh FSDP works on: (replicate, shard) where there are several copies, else (shard,)."""
        if self.layout.data_replicate > 1:
            return self.device_mesh[DATA_AXES]
        return self.device_mesh["data_shard"]

    def all_reduce(
        self, tensor: torch.Tensor, axes: tuple[str, ...], op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> torch.Tensor:
        """Reduce a tensor in place over the named axes, and return it. Every rank of those axes must call it."""
        for axis in axes:
            if self.size[axis] > 1:
                dist.all_reduce(tensor, op=op, group=self.device_mesh.get_group(axis))
        return tensor
