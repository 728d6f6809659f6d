# SPDX-License-Identifier: Apache-2.0
"""Sizes of the axes, the order of ranks on them, and errors that say what to do."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from parallel.errors import UserError
from parallel.mesh import AXES, SINGLE, ParallelLayout, ParallelMesh, TensorParallel, fit_data_size
from tests.worlds import CPU, make_mesh, make_tensor_parallel, run_world


def _assert_sentence(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    """One sentence that gives what was given, what was expected, and (after a colon) what to do."""
    text = str(error.value)
    assert "\n" not in text
    assert ": " in text
    assert not text.endswith(".")
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline", "data", "expected"),
    [(8, 2, 2, None, 2), (8, 2, 2, 2, 2), (1, 1, 1, None, 1), (6, 2, 1, None, 3), (4, 4, 1, None, 1)],
)
def test_fit_data_size(world, tensor, pipeline, data, expected):
    assert fit_data_size(world, tensor=tensor, pipeline=pipeline, data=data) == expected


def test_sizes_that_do_not_divide_the_world():
    with pytest.raises(UserError) as error:
        fit_data_size(8, tensor=3, pipeline=2)
    _assert_sentence(
        error, "tensor 3 x pipeline 2 = 6", "8 processes", "start a multiple of 6", "change tensor / pipeline"
    )
    with pytest.raises(UserError) as error:
        fit_data_size(1, tensor=2, pipeline=1)  # a world smaller than the model
    _assert_sentence(error, "tensor 2 x pipeline 1 = 2", "1 processes")


@pytest.mark.parametrize(("world", "data"), [(8, 3), (8, 1), (2, 2)])
def test_a_data_size_that_does_not_fit(world, data):
    with pytest.raises(UserError) as error:
        fit_data_size(world, tensor=2, pipeline=1, data=data)
    _assert_sentence(error, f"data {data} = {2 * data}", f"{world} processes", f"start {2 * data}", "leave data unset")


@pytest.mark.parametrize("name", ["tensor", "pipeline", "data", "data_shard"])
def test_sizes_below_one(name):
    with pytest.raises(UserError) as error:
        ParallelLayout(**{name: 0})
    _assert_sentence(error, f"{name} is 0", "give 1 or more")


def test_a_shard_size_that_does_not_divide_the_data_ranks():
    with pytest.raises(UserError) as error:
        ParallelLayout(data=6, data_shard=4)
    _assert_sentence(error, "6 data-parallel ranks", "groups of 4", "choose a shard size that divides")


def test_sequence_parallelism_without_tensor_parallelism():
    with pytest.raises(UserError) as error:
        ParallelLayout(sequence=True)
    _assert_sentence(error, "sequence=true", "tensor of 2 or more")


def test_layout_sizes():
    layout = ParallelLayout(tensor=2, pipeline=3, data=8, data_shard=4)
    assert layout.world_size == 48
    assert layout.data_replicate == 2


def _wrong_world() -> None:
    with pytest.raises(UserError) as error:
        ParallelMesh(ParallelLayout(tensor=4), CPU)
    _assert_sentence(error, "takes 4 processes", "2 were started", "start 4")


def test_a_world_of_another_size():
    run_world(2, _wrong_world)


def _coordinates(**layout) -> tuple[dict[str, int], int, str, list[list[int]]]:
    mesh = make_mesh(**layout)
    groups = [dist.get_process_group_ranks(mesh.device_mesh.get_group(axis)) for axis in AXES]
    return mesh.coordinate, mesh.data_rank, repr(mesh), groups


def _eight_ranks():
    return _coordinates(tensor=2, data=2, pipeline=2)


def test_tensor_ranks_are_neighbors():
    for rank, (coordinate, data_rank, text, groups) in enumerate(run_world(8, _eight_ranks)):
        tensor, data, pipeline = rank % 2, rank // 2 % 2, rank // 4
        assert coordinate == {"tensor": tensor, "data_replicate": data, "data_shard": 0, "pipeline": pipeline}
        assert data_rank == data
        assert f"rank {rank}: pipeline {pipeline}/2" in text
        by_axis = dict(zip(AXES, groups, strict=True))
        assert by_axis["tensor"] == [rank - tensor, rank - tensor + 1]
        assert by_axis["data_replicate"] == [rank - 2 * data, rank - 2 * data + 2]
        assert by_axis["pipeline"] == [rank % 4, rank % 4 + 4]


def _hybrid():
    return _coordinates(data=4, data_shard=2)


def test_shard_groups_are_neighbors():
    results = run_world(4, _hybrid)
    assert [result[1] for result in results] == [0, 1, 2, 3]
    assert [result[0]["data_shard"] for result in results] == [0, 1, 0, 1]
    assert [result[0]["data_replicate"] for result in results] == [0, 0, 1, 1]


def _handles() -> tuple[TensorParallel, TensorParallel, list[int]]:
    plain, divided = (
        make_mesh(tensor=2, data=2).tensor_parallel,
        make_mesh(tensor=2, data=2, sequence=True).tensor_parallel,
    )
    assert plain.group_name == plain.group.group_name != ""
    assert divided.sequence
    assert not plain.sequence
    assert make_mesh(data=4).tensor_parallel is SINGLE
    return plain.rank, plain.size, dist.get_process_group_ranks(plain.group)


def test_tensor_parallel_handles():
    assert run_world(4, _handles) == [(0, 2, [0, 1]), (1, 2, [0, 1]), (0, 2, [2, 3]), (1, 2, [2, 3])]


def test_the_handle_of_an_undivided_model():
    assert (SINGLE.rank, SINGLE.size, SINGLE.sequence, SINGLE.group_name) == (0, 1, False, "")
    assert make_tensor_parallel() is SINGLE
    with pytest.raises(AssertionError, match="no process group"):
        _ = SINGLE.group


def _sums() -> list[float]:
    mesh = make_mesh(tensor=2, data=2)
    value = float(2 ** dist.get_rank())
    axes = [("tensor",), ("data_replicate",), ("tensor", "data_replicate", "pipeline"), ()]
    sums = [mesh.all_reduce(torch.tensor(value), axis).item() for axis in axes]
    return [*sums, mesh.all_reduce(torch.tensor(value), ("tensor",), dist.ReduceOp.MAX).item()]


def test_reductions_over_named_axes():
    assert run_world(4, _sums) == [
        [3.0, 5.0, 15.0, 1.0, 2.0],
        [3.0, 10.0, 15.0, 2.0, 2.0],
        [12.0, 5.0, 15.0, 4.0, 8.0],
        [12.0, 10.0, 15.0, 8.0, 8.0],
    ]


def _data_meshes() -> list[tuple[str, ...]]:
    layouts = ({"data": 4}, {"data": 4, "data_shard": 4}, {"data": 4, "data_shard": 2}, {"tensor": 2, "data": 2})
    return [make_mesh(**layout).data_mesh().mesh_dim_names for layout in layouts]


def test_data_meshes():
    both = ("data_replicate", "data_shard")
    assert run_world(4, _data_meshes)[0] == [both, ("data_shard",), both, both]
