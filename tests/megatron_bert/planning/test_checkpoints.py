# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of 64 ranks, planned in one process: every byte is written once, by ranks that share the work."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_bert.planning.checkpoints import METADATA_BYTES, SavedTensor, plan_checkpoint
from parallel.checkpoint_plan import HeldTensor, WritePlan, global_plans, local_plan
from parallel.stored.distributed_files import METADATA, BlockedTensor, read_metadata
from parallel.stored.file_range import FileRange

RANKS = 64
#: What the archive around a block takes in its file, at most: headers and the pickle of shape and type.
BLOCK_OVERHEAD = 1024
#: Of a layer: divided over the tensor axis, and not.
DIVIDED, WHOLE = (64, 128), (128, 5)
LAYERS = 3
KINDS = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")


class Layout(NamedTuple):
    """Sizes of the axes; the data axis has the rest."""

    tensor: int
    pipeline: int
    sharding: str

    @property
    def data(self) -> int:
        return RANKS // self.tensor // self.pipeline

    def sharded(self, kind: str) -> bool:
        """Whether the data axis divides weights or moments."""
        return self.sharding == "full" or (self.sharding == "optimizer" and kind != "model")


LAYOUTS = [Layout(1, 1, "none"), Layout(2, 4, "none"), Layout(2, 4, "optimizer"), Layout(8, 2, "full")]


def state(layout: Layout, mesh: DeviceMesh) -> dict[str, Tensor]:
    """What a rank holds."""
    stage, tensors = mesh.get_local_rank("pipeline"), dict[str, Tensor]()
    inner = mesh["data", "tensor"]
    for layer in range(LAYERS):
        for kind in KINDS:
            for name, shape, divided in (("weight", DIVIDED, True), ("norm", WHOLE, False)):
                placements = (
                    Shard(1 if divided else 0) if layout.sharded(kind) else Replicate(),
                    Shard(0) if divided else Replicate(),
                )
                whole = torch.empty(shape, device="meta")
                local = whole
                for place, axis in zip(placements, ("data", "tensor"), strict=True):
                    if isinstance(place, Shard):
                        pieces = local.chunk(inner.size(0 if axis == "data" else 1), place.dim)
                        index = mesh.get_local_rank(axis)
                        local = pieces[index] if index < len(pieces) else local.narrow(place.dim, 0, 0)
                tensors[f"{kind}.layers.{stage * LAYERS + layer}.{name}"] = DTensor.from_local(
                    local, inner, placements, run_check=False, shape=whole.shape, stride=whole.stride()
                )
    return tensors


Planned = tuple[Layout, list[WritePlan], list[list[HeldTensor]]]


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def planned(request: pytest.FixtureRequest) -> Planned:
    """A layout, and what each of its ranks writes and holds."""
    layout: Layout = request.param
    local = []
    for rank in range(RANKS):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
        try:
            mesh = init_device_mesh(
                "cpu", (layout.pipeline, layout.data, layout.tensor), mesh_dim_names=("pipeline", "data", "tensor")
            )
            local.append(local_plan(state(layout, mesh)))
        finally:
            dist.destroy_process_group()
    return layout, global_plans(local), local


def expected(layout: Layout) -> list[SavedTensor]:
    return [
        SavedTensor(
            nbytes=4 * shape[0] * shape[1],
            shards=(layout.tensor if divided else 1)
            * (min(layout.data, shape[1 if divided else 0]) if layout.sharded(kind) else 1),
            stage=stage,
        )
        for stage in range(layout.pipeline)
        for _ in range(LAYERS)
        for kind in KINDS
        for shape, divided in ((DIVIDED, True), (WHOLE, False))
    ]


def stored(plans: list[WritePlan], folder: Path) -> dict[str, BlockedTensor]:
    assert plans[0].metadata is not None
    (folder / METADATA).write_bytes(plans[0].metadata)
    return read_metadata(FileRange.whole(folder / METADATA))


def test_files_bytes_and_entries(planned: Planned, tmp_path: Path) -> None:
    layout, plans, _ = planned
    closed = plan_checkpoint(expected(layout), RANKS, layout.pipeline)
    pieces = [piece for plan in plans for piece in plan.pieces if piece.nbytes]
    values = [sum(piece.nbytes for piece in plan.pieces) for plan in plans]
    assert sum(values) == closed.value_bytes
    assert len(pieces) == closed.blocks
    assert sum(bool(value) for value in values) == closed.files
    assert max(values) <= closed.rank_bytes
    for plan, value in zip(plans, values, strict=True):
        assert value <= sum(piece.length for piece in plan.pieces) <= value + len(plan.pieces) * BLOCK_OVERHEAD
        assert (plan.file is None) == (value == 0)
    blocks = [(name, block) for name, tensor in stored(plans, tmp_path).items() for block in tensor.blocks]
    assert len({(name, block.offsets) for name, block in blocks}) == len(blocks) == closed.blocks
    assert len({(block.file, block.start) for _, block in blocks}) == len(blocks)
    metadata = plans[0].metadata
    assert metadata is not None
    assert 0.3 < len(metadata) / (len(blocks) * METADATA_BYTES) < 3


def test_one_rank_writes_no_more_than_there_is() -> None:
    tensors = [SavedTensor(nbytes=size) for size in (100, 7, 5)]
    assert plan_checkpoint(tensors, 1, 1).rank_bytes == plan_checkpoint(tensors, 1, 1).value_bytes == 112
    assert plan_checkpoint(tensors, 2, 1).rank_bytes == 112
    assert plan_checkpoint([SavedTensor(nbytes=10)] * 10, 5, 1).rank_bytes == 30


def test_a_rank_reads_the_blocks_of_its_part_once(planned: Planned, tmp_path: Path) -> None:
    """At the layout that saved it a rank reads one block a tensor, whichever of its copies was written."""
    _, plans, local = planned
    tensors = stored(plans, tmp_path)
    for held in local:
        for tensor in held:
            for region in tensor.regions:
                found = [block for block in tensors[tensor.name].blocks if block.within(*region) is not None]
                assert len(found) == (0 if 0 in region[1] else 1)
