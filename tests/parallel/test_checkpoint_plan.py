# SPDX-License-Identifier: Apache-2.0
"""Plans of checkpoints and their metadata, beside those that torch.distributed.checkpoint makes of the same tensors."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from parallel.checkpoint_plan import HeldTensor, WritePlan, global_plans
from parallel.parts import flat_regions


def held(name: str, shape: tuple[int, ...], first: int, last: int, dtype: torch.dtype = torch.float32) -> HeldTensor:
    return HeldTensor(name, shape, dtype, tuple(flat_regions(shape, first, last)))


#: Three ranks: blocks of a matrix, tensors that all or two of them have, an empty block, a scalar and a whole tensor.
RANKS = [
    [
        held("matrix", (4, 6), 0, 9),
        held("copied", (5,), 0, 5, torch.bfloat16),
        held("scalar", (), 0, 1),
        HeldTensor("rows", (2, 3), torch.int64, (((0, 0), (2, 3)),)),
    ],
    [
        held("matrix", (4, 6), 9, 20),
        held("copied", (5,), 0, 5, torch.bfloat16),
        held("other", (7, 2), 0, 14),
        HeldTensor("rows", (2, 3), torch.int64, (((2, 0), (0, 3)),)),
    ],
    [
        held("matrix", (4, 6), 20, 24),
        held("copied", (5,), 0, 5, torch.bfloat16),
        held("other", (7, 2), 0, 14),
        held("alone", (3, 2, 2), 0, 12, torch.float16),
    ],
]


def torch_plan(tensors: list[HeldTensor]) -> SavePlan:
    items = []
    for tensor in tensors:
        for region in tensor.regions:
            chunk = ChunkStorageMetadata(*map(torch.Size, region))
            data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape))
            items.append(WriteItem(MetadataIndex(tensor.name, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
    return SavePlan(items, planner_data={tensor.name: (tensor.name,) for tensor in tensors})


def metadata_of(plans: list[WritePlan]) -> Metadata:
    assert plans[0].metadata is not None
    assert all(plan.metadata is None for plan in plans[1:])
    found = pickle.loads(plans[0].metadata)
    assert type(found) is Metadata
    return found


@pytest.mark.parametrize("local", [RANKS, RANKS[::-1], [RANKS[2][1:]]], ids=["three", "backward", "one"])
def test_the_plan_is_the_one_torch_makes(local: list[list[HeldTensor]]) -> None:
    plans = global_plans(local)
    expected, metadata = DefaultSavePlanner().create_global_plan([torch_plan(tensors) for tensors in local])
    metadata.version, metadata.storage_data = CURRENT_DCP_VERSION, {}
    for rank, (plan, theirs) in enumerate(zip(plans, expected, strict=True)):
        assert plan.blocks == tuple((item.index.fqn, tuple(item.index.offset)) for item in theirs.items)
        position = 0
        for item, piece in zip(theirs.items, plan.pieces, strict=True):
            metadata.storage_data[item.index] = _StorageInfo(f"__{rank}_0.distcp", position, piece.length)
            position += piece.length
    found = metadata_of(plans)
    assert found == metadata
    # Classes, order, and the numbers of blocks, which do not count in comparisons.
    assert repr(found.storage_data) == repr(metadata.storage_data)
    assert repr(found.state_dict_metadata) == repr(metadata.state_dict_metadata)


@pytest.mark.parametrize(
    "local",
    [
        [[held("x", (4, 6), 0, 9)], [held("x", (4, 6), 10, 24)]],
        [[held("x", (4, 6), 0, 9)], [held("x", (4, 6), 7, 24)]],
        [[held("x", (4, 6), 0, 24)], [held("x", (4, 6), 6, 12)]],
    ],
    ids=["gap", "overlap", "twice"],
)
def test_blocks_that_do_not_make_up_a_tensor(local: list[list[HeldTensor]]) -> None:
    with pytest.raises(ValueError, match="the blocks that ranks have of x do not make it up"):
        global_plans(local)
