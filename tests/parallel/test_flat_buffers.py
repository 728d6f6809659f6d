# SPDX-License-Identifier: Apache-2.0
"""Flat buffers: what they hold, what they communicate and when."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel import data_parallel
from parallel.data_parallel import apply_data_parallel, finish_gradients, flat_buffers, set_gradient_sync
from parallel.flat_buffers import ALIGNMENT, FlatBuffers, all_gather
from parallel.gradients import global_gradient_norm
from parallel.mesh import ParallelMesh, data_shard_size
from parallel.sharding import initialize
from tests.parallel.support import ToyModel, full_gradients, runs_of
from tests.worlds import Together, gathered, make_mesh, run_world

IDS = torch.tensor([0, 9, 3, 3, 7, 5, 0, 2])
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def prepared(mesh: ParallelMesh, sharding: str, dtype: torch.dtype = torch.float32) -> tuple[ToyModel, FlatBuffers]:
    model = ToyModel(tp=mesh.tensor_parallel)
    initialize(model, 5)
    apply_data_parallel(model, model.units(), mesh, sharding=sharding, compute_dtype=dtype)
    flat = flat_buffers(model)
    assert flat is not None
    return model, flat


@contextmanager
def pretended_world(size: int, sharding: str) -> Iterator[ParallelMesh]:
    """The first of so many data ranks, whose collectives reach nobody."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield make_mesh(data=size, data_shard=data_shard_size(sharding, size, None))
    finally:
        dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Counts collectives by kind and the bytes of their larger side."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            sizes = [leaf.nbytes for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.seen[function.name().split("::")[1], max(sizes, default=0)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharding", ["none", "optimizer"])
@pytest.mark.parametrize("ranks", [1, 8, 64, 512])
def test_collectives_of_a_step(ranks, sharding, dtype, monkeypatch):
    """A reduction and a gather of every bucket, and one number for the norm; nothing twice, in any number of passes."""
    monkeypatch.setattr(data_parallel, "_GROUP_PARAMETERS", 1)
    with pretended_world(ranks, sharding) as mesh:
        model, flat = prepared(mesh, sharding, DTYPES[dtype])
        with Collectives() as collectives:
            for last in (False, False, True):
                set_gradient_sync(model, last)
                model.loss(IDS).backward()
            finish_gradients(model)
            finish_gradients(model)
            counted = [run.gradient for run in flat.runs(lambda _: None) if run.counted_here(mesh)]
            global_gradient_norm([gradient for gradient in counted if gradient is not None], mesh)
            flat.publish()
            model.loss(IDS)
        unit = ALIGNMENT * (ranks if sharding == "optimizer" else 1)
        groups = [model.embedding, *model.layers]
        elements = [
            unit * math.ceil(sum(ALIGNMENT * math.ceil(p.numel() / ALIGNMENT) for p in group.parameters()) / unit)
            for group in groups
        ]
        assert [bucket.size for bucket in flat.buckets] == elements
        expected: Counter[tuple[str, int]] = Counter()
        if ranks > 1:
            expected["allreduce_", 4] += 1
            for size in elements:
                if sharding == "optimizer":
                    expected["_reduce_scatter_base_", 4 * size] += 1
                    expected["_allgather_base_", DTYPES[dtype].itemsize * size] += 1
                else:
                    expected["allreduce_", 4 * size] += 1
        assert collectives.seen == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharding", ["none", "optimizer"])
@pytest.mark.parametrize("ranks", [1, 8, 512])
def test_bytes(ranks, sharding, dtype):
    """Weights, gradients and master weights: 10 a parameter in bfloat16, or 6 + 4 / d on d ranks that divide them."""
    with pretended_world(ranks, sharding) as mesh:
        model, flat = prepared(mesh, sharding, DTYPES[dtype])
        elements = flat.gradients.numel()
        divided = ranks if sharding == "optimizer" else 1
        found = sum(buffer.untyped_storage().nbytes() for buffer in (flat.weights, flat.gradients, flat.masters))
        assert found == elements * (8 if dtype == "float32" else 6 + 4 / divided)
        parameters = list(model.parameters())
        # Each parameter and each bucket is filled up, which large ones do not notice.
        room = ALIGNMENT * (len(parameters) + divided * len(flat.buckets))
        assert elements - room <= sum(parameter.numel() for parameter in parameters) <= elements
        for parameter in parameters:
            assert parameter.untyped_storage().data_ptr() == flat.weights.untyped_storage().data_ptr()
            assert parameter.grad.untyped_storage().data_ptr() == flat.gradients.untyped_storage().data_ptr()
            assert parameter.data_ptr() % (ALIGNMENT * parameter.itemsize) == flat.weights.data_ptr() % (
                ALIGNMENT * parameter.itemsize
            )


def _ranges(sharding: str, dtype: torch.dtype) -> None:
    """Every element is updated once, or on every rank where nothing is divided; weights follow the master weights."""
    data = dist.get_world_size() // 2
    mesh = make_mesh(tensor=2, data=data, data_shard=data_shard_size(sharding, data, None))
    model, flat = prepared(mesh, sharding, dtype)
    whole = ToyModel()
    initialize(whole, 5)
    shapes = {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
    runs = {parameter: run for run in runs_of(model) for parameter in run.members}
    for name, parameter in model.named_parameters():
        run = runs[parameter]
        part = run.part(parameter, run.values)
        assert part.shape == shapes[name]
        assert gathered(part, mesh).equal(whole.get_parameter(name).detach()), name
        for (offsets, _), values in part.blocks():
            values.copy_(torch.arange(values.numel()).view(values.shape) + 100.0 * sum(offsets))
    flat.publish()
    flat.wait()
    for name, parameter in model.named_parameters():
        run = runs[parameter]
        target = gathered(run.part(parameter, run.values), mesh)
        dim = next((d for d, (a, b) in enumerate(zip(shapes[name], parameter.shape)) if a != b), None)
        local = target if dim is None else target.chunk(2, dim)[mesh.coordinate["tensor"]]
        assert parameter.detach().equal(local.to(dtype)), name


RANGES = Together(*((6, _ranges, sharding, dtype) for sharding in ("none", "optimizer") for dtype in DTYPES.values()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharding", ["none", "optimizer"])
def test_ranges_make_up_the_parameters(sharding, dtype):
    RANGES(6, _ranges, sharding, DTYPES[dtype])


def _overlapping() -> tuple[list[bool], list[bool], list[bool], list[bool]]:
    """Which buckets communicate: before the last backward pass ends, after it; before and after a layer runs."""
    data_parallel._GROUP_PARAMETERS = 1
    mesh = make_mesh(data=2, data_shard=2)
    model, flat = prepared(mesh, "optimizer")

    def states(kind: str) -> list[bool]:
        return [getattr(bucket, kind) is not None for bucket in flat.buckets]

    seen: list[list[bool]] = []
    set_gradient_sync(model, last=True)
    out = model(IDS)
    # The embedding's gradient comes last of all.
    model.embedding.weight.register_hook(lambda _: seen.append(states("reducing")))
    out.sum().backward()
    after = states("reducing")
    finish_gradients(model)
    assert not any(states("reducing"))
    flat.publish()
    model.layers[1].register_forward_pre_hook(lambda *_: seen.append(states("gathering")), prepend=True)
    before = states("gathering")
    model(IDS)
    assert not any(states("gathering"))
    return seen[0], after, before, seen[1]


def test_communication_overlaps_computation():
    for reducing, after, gathering, between in run_world(2, _overlapping):
        assert reducing == [False, True, True]  # around the layers, and the layers
        assert after == [True] * 3
        assert gathering == [True] * 3
        assert between == [False, False, True]


class _Late:
    """A gather whose numbers arrive as late as they may: when they are waited for."""

    def __init__(self, *tensors: Tensor, group: Any, async_op: bool) -> None:
        assert async_op
        self.wait = partial(all_gather, *tensors, group=group)


def _arriving_behind_the_forward_pass() -> None:
    data_parallel._GROUP_PARAMETERS = 1
    model, flat = prepared(make_mesh(data=2, data_shard=2), "optimizer")
    found = []
    for gather in (all_gather, _Late):
        flat.zero()
        with mock.patch("parallel.flat_buffers.all_gather", gather):
            flat.publish()
        model.loss(IDS).backward()
        found.append(full_gradients(model))
    assert all(gradient.equal(found[1][name]) for name, gradient in found[0].items())


def test_weights_that_arrive_behind_the_forward_pass_are_no_change_of_those_before():
    run_world(2, _arriving_behind_the_forward_pass)


def _accumulated(dtype: torch.dtype) -> None:
    model, flat = prepared(make_mesh(), "none", dtype)
    total = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
    for ids in IDS.chunk(4):
        model.loss(ids).backward()
        single = ToyModel()
        initialize(single, 5)
        single.to(dtype).loss(ids).backward()
        for name, parameter in single.named_parameters():
            total[name] += parameter.grad.float()
    for name, gradient in full_gradients(model).items():
        assert gradient.dtype == torch.float32
        assert gradient.equal(total[name]), name
    flat.zero()
    assert all(parameter.grad.eq(0).all() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_micro_batches_add_up_in_float32(dtype):
    """To the last bit: each gradient is rounded to the format of the computation, their sum is not."""
    run_world(1, _accumulated, dtype)


def _alone() -> None:
    mesh = make_mesh(data=3, data_shard=3)
    ranges = []
    for layers in (1, 3):  # two stages that share the embedding
        model = ToyModel(layers=layers)
        initialize(model, 5)
        apply_data_parallel(
            model,
            model.units(),
            mesh,
            sharding="optimizer",
            compute_dtype=torch.float32,
            alone=[model.embedding.weight],
        )
        (run,) = [run for run in runs_of(model) if model.embedding.weight in run.members]
        assert len(run.members) == 1 or not run.values.numel()
        ranges.append(run.members[model.embedding.weight].regions)
    assert ranges[0] == ranges[1]


def test_a_shared_parameter_is_divided_alike_on_both_stages():
    run_world(3, _alone)


class Twice(nn.Module):
    """One parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def _twice() -> None:
    torch.manual_seed(1)
    model = Twice()
    mesh = make_mesh(data=2, data_shard=2)
    apply_data_parallel(model, [model.second], mesh, sharding="optimizer", compute_dtype=torch.float32)
    assert model.first.weight is model.second.weight
    flat = flat_buffers(model)
    flat.publish()
    model.first.register_forward_pre_hook(lambda *_: seen.append([bucket.gathering for bucket in flat.buckets]))
    seen = []
    model(torch.ones(1, 3)).sum().backward()
    assert seen == [[None]]  # waited for before its first use, which is outside of the layer
    assert model.first.weight.grad.count_nonzero() > 0


def test_a_parameter_used_twice_stays_one():
    run_world(2, _twice)
