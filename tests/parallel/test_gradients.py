# SPDX-License-Identifier: Apache-2.0
"""Gradients of divided and data-parallel models, their norm and their clipping, against one plain model.

The model has a divided embedding, column and row layers with biases, and norms; every layout sees the same eight
tokens, so that every gradient must come out equal to the plain one, summed over data ranks.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel import data_parallel
from parallel.data_parallel import apply_data_parallel, finish_gradients, flat_buffers, set_gradient_sync
from parallel.gradients import (
    clip_factor,
    global_gradient_norm,
    raw_local,
    sum_token_partial_gradients,
    token_partial_parameters,
)
from parallel.mesh import SINGLE, ParallelMesh, Sharding, data_shard_size
from parallel.process_group import process_group
from parallel.sharding import initialize
from tests.parallel.support import Operators, ToyModel, full_gradients, runs_of
from tests.worlds import Together, make_mesh, make_tensor_parallel, run_world

TOKENS = torch.tensor([0, 9, 3, 3, 7, 5, 0, 2, 1, 4, 8, 9, 6, 6, 2, 1])
#: float32 gradients of two layers, up to some hundreds in size: a few hundred roundings of 6e-8 on the way to each.
CLOSE = {"rtol": 2e-5, "atol": 2e-4}

SHARDINGS = ("none", "optimizer", "full", "hybrid")


def _mesh(tensor: int, sequence: bool, sharding: Sharding) -> ParallelMesh:
    data = dist.get_world_size() // tensor
    return make_mesh(
        tensor=tensor, data=data, data_shard=data_shard_size(sharding, data, max(1, data // 2)), sequence=sequence
    )


def _model(mesh: ParallelMesh, sharding: Sharding = "none", dtype: torch.dtype = torch.float32) -> ToyModel:
    model = ToyModel(tp=mesh.tensor_parallel)
    initialize(model, 5)
    apply_data_parallel(model, model.units(), mesh, sharding=sharding, compute_dtype=dtype)
    return model


def _plain(chunks: int = 1) -> ToyModel:
    model = ToyModel()
    initialize(model, 5)
    for tokens in TOKENS.chunk(chunks):
        model.loss(tokens).backward()
    return model


def _all_layouts(tensor: int, sequence: bool, sharding: Sharding, micro_batches: int) -> None:
    mesh = _mesh(tensor, sequence, sharding)
    model = _model(mesh, sharding)
    own = TOKENS.chunk(mesh.layout.data)[mesh.data_rank]
    for number, tokens in enumerate(own.chunk(micro_batches)):
        set_gradient_sync(model, last=number == micro_batches - 1)
        out = model(tokens)
        (out.float().square() * torch.arange(1.0, ToyModel.SIZE + 1)).sum().backward()
    finish_gradients(model)
    sum_token_partial_gradients(model, mesh.tensor_parallel)

    plain = _plain(mesh.layout.data * micro_batches)
    expected = {name: parameter.grad.clone() for name, parameter in plain.named_parameters()}
    gradients = full_gradients(model)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")

    # Every element stands for its copies on exactly one rank.
    counted = [run for run in runs_of(model) if run.counted_here(mesh)]
    elements = torch.tensor(sum(member.count for run in counted for member in run.members.values()))
    assert int(mesh.all_reduce(elements, ("tensor", "data_shard", "data_replicate"))) == sum(
        parameter.numel() for parameter in plain.parameters()
    )

    own = [run.gradient for run in counted]
    norm = global_gradient_norm(own, mesh)
    maximum = 0.5 * float(norm)
    expected_norm = nn.utils.clip_grad_norm_(plain.parameters(), maximum)
    torch.testing.assert_close(norm, expected_norm, rtol=2e-5, atol=0)
    for run in runs_of(model):
        run.gradient.mul_(clip_factor(norm, maximum))
    clipped = full_gradients(model)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(clipped[name], parameter.grad, **CLOSE)
    torch.testing.assert_close(global_gradient_norm(own, mesh), torch.tensor(maximum), rtol=2e-5, atol=0)


@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel(size, sequence):
    WORLDS(size, _all_layouts, size, sequence, "none", 1)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("size", [2, 4])
def test_data_parallel(size, sharding):
    WORLDS(size, _all_layouts, 1, False, sharding, 1)


@pytest.mark.parametrize(("sequence", "micro_batches"), [(False, 1), (True, 2)], ids=["plain", "sequence-accumulated"])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_tensor_and_data_parallel(sharding, sequence, micro_batches):
    WORLDS(4, _all_layouts, 2, sequence, sharding, micro_batches)


def test_hybrid_over_two_groups_with_tensor_parallelism():
    run_world(8, _all_layouts, 2, True, "hybrid", 2)


def test_small_units_are_gathered_together(monkeypatch):
    units = [nn.Linear(size, 1, bias=False) for size in (6, 4, 6, 10, 3, 3)]
    monkeypatch.setattr(data_parallel, "_GROUP_PARAMETERS", 10)
    assert data_parallel._grouped(units) == [units[:2], units[2:4], units[4:]]
    assert data_parallel._grouped([]) == []


def _collectives(sharding: Sharding, *names: str) -> list[int]:
    """How many of the named run in the passes of three micro batches of one step, and of the next step's first."""
    mesh = _mesh(1, False, sharding)
    model = _model(mesh, sharding)
    counts = []
    for number in range(4):
        set_gradient_sync(model, last=number == 2)
        with Operators() as passes:
            model(TOKENS).sum().backward()
            if number == 2:
                finish_gradients(model)
        if number == 2 and (flat := flat_buffers(model)) is not None:
            with passes:
                flat.publish()
        counts.append(passes.count(*names))
    return counts


REDUCTIONS = ("_reduce_scatter_base_", "reduce_scatter_", "allreduce_")
GATHERS = ("_allgather_base_", "allgather_")


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_gradients_are_reduced_in_the_last_backward_pass_only(sharding):
    for first, second, last, _ in WORLDS(2, _collectives, sharding, *REDUCTIONS):
        assert (first, second) == (0, 0)
        assert last > 0


def test_parameters_are_gathered_in_every_pass_where_they_are_divided():
    for first, second, last, following in WORLDS(2, _collectives, "full", *GATHERS):
        assert first == second == last == following > 0


def test_updated_weights_are_gathered_once_a_step():
    for counts in WORLDS(2, _collectives, "optimizer", *GATHERS):
        assert counts == [0, 0, 2, 0]  # of the layers, and of what is around them


def _bfloat16(sharding: Sharding) -> None:
    mesh = _mesh(1, False, sharding)
    model = _model(mesh, sharding, torch.bfloat16)
    seen = []
    model.layers[0].column.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    out = model(TOKENS.chunk(mesh.layout.data)[mesh.data_rank])
    out.float().square().sum().backward()
    assert seen == [torch.bfloat16]
    assert out.dtype == torch.bfloat16
    for run in runs_of(model):
        assert run.values.dtype == torch.float32
        assert run.gradient.dtype == torch.float32
    exact = ToyModel()
    initialize(exact, 5)
    exact(TOKENS).square().sum().backward()
    gradients = full_gradients(model)
    for name, parameter in exact.named_parameters():
        # bfloat16 keeps 8 bits; through two layers a gradient is right to a few of their roundings in the norm.
        error = float((gradients[name] - parameter.grad).norm() / parameter.grad.norm())
        assert error < 16 * torch.finfo(torch.bfloat16).eps, (name, error)


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("size", [1, 2])
def test_bfloat16_computes_and_float32_stays(size, sharding):
    WORLDS(size, _bfloat16, sharding)


def _one_rank() -> None:
    mesh = make_mesh()
    model = _model(mesh)
    plain = _plain(2)
    with Operators() as operators:
        for tokens in TOKENS.chunk(2):
            set_gradient_sync(model, last=True)
            model.loss(tokens).backward()
        finish_gradients(model)
        flat_buffers(model).publish()
    assert not any("reduce" in name or "gather" in name for name in operators.names)
    for name, parameter in plain.named_parameters():
        assert model.get_parameter(name).grad.equal(parameter.grad)


def test_one_rank_in_float32_computes_what_a_plain_model_does_and_communicates_nothing():
    WORLDS(1, _one_rank)


def _resharding(sharding: Sharding) -> list[int]:
    mesh = _mesh(1, False, sharding)
    model = _model(mesh, sharding)
    out = model(TOKENS)
    with Operators() as backward:
        out.sum().backward()
    return backward.count(*GATHERS)


RESHARDING = [("none", 0), ("optimizer", 0), ("full", 2), ("hybrid", 2)]


@pytest.mark.parametrize(("sharding", "gathers"), RESHARDING)
def test_parameters_gathered_again_in_the_backward_pass(sharding, gathers):
    # One gather for each of the two units; the embedding around them stays gathered.
    size = 4 if sharding == "hybrid" else 2
    assert WORLDS(size, _resharding, sharding) == [gathers] * size


@pytest.mark.parametrize(
    ("sharding", "data", "hybrid", "expected"),
    [("none", 8, None, 1), ("optimizer", 8, None, 8), ("full", 8, None, 8), ("hybrid", 8, 4, 4)],
)
def test_data_shard_size(sharding, data, hybrid, expected):
    assert data_shard_size(sharding, data, hybrid) == expected


def _partial() -> None:
    tp = make_tensor_parallel(sequence=True)
    model = ToyModel(tp=tp)
    initialize(model, 5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    partial = [names[id(parameter)] for parameter in token_partial_parameters(model)]
    assert partial == [f"layers.{i}.{name}" for i in range(2) for name in ("norm.weight", "norm.bias", "row.bias")]

    sum_token_partial_gradients(model, tp)  # without gradients there is nothing to do
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(10 * number + tp.rank + 1))
    before = {name: raw_local(parameter.grad).clone() for name, parameter in model.named_parameters()}
    next(token_partial_parameters(model)).grad = None  # a frozen one is left out
    with Operators() as operators:
        sum_token_partial_gradients(model, tp)
    assert operators.count("allreduce_", "all_reduce") == 1
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if name == partial[0]:
            assert parameter.grad is None
        elif name in partial:
            assert parameter.grad.eq(20.0 * number + 3).all(), name
        else:
            assert raw_local(parameter.grad).equal(before[name]), name


def test_partial_gradients_are_summed_once():
    WORLDS(2, _partial)
    model = _plain()
    before = copy.deepcopy([parameter.grad for parameter in model.parameters()])
    assert list(token_partial_parameters(model)) == []
    sum_token_partial_gradients(model, SINGLE)
    assert all(p.grad.equal(b) for p, b in zip(model.parameters(), before, strict=True))


def _no_gradients() -> float:
    mesh = make_mesh(tensor=2)
    return float(global_gradient_norm([], mesh))


def test_the_norm_without_gradients_is_zero():
    assert WORLDS(2, _no_gradients) == [0.0, 0.0]


@pytest.mark.parametrize("norm", [0.0, 0.3, 1.0, 40.0])
def test_clip_factor(norm):
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([norm])
    nn.utils.clip_grad_norm_([parameter], 1.0)
    torch.testing.assert_close(torch.tensor([norm]) * clip_factor(torch.tensor(norm), 1.0), parameter.grad)


def test_a_norm_that_is_not_a_number_shows():
    assert clip_factor(torch.tensor(float("nan")), 1.0).isnan()
    assert clip_factor(torch.tensor(float("inf")), 1.0) == 0


@pytest.mark.parametrize("shape", [(2048, 2048), (50_000,)])
def test_the_norm_of_millions_of_numbers_is_accurate(shape):
    gradient = torch.randn(shape)
    with process_group("cpu"):
        norm = global_gradient_norm([gradient], make_mesh())
    # Pairwise or blocked sums of 4 million squares keep a relative error well below 100 eps; one running float32 sum
    # in a few lanes does not.
    torch.testing.assert_close(norm.double(), gradient.double().norm(), rtol=100 * 1.2e-7, atol=0)


#: Of all tests above but that of eight ranks, which is the only one.
WORLDS = Together(
    *((size, _all_layouts, size, sequence, "none", 1) for size in (2, 4) for sequence in (False, True)),
    *((size, _all_layouts, 1, False, sharding, 1) for size in (2, 4) for sharding in SHARDINGS),
    *((4, _all_layouts, 2, *case) for sharding in SHARDINGS for case in ((False, sharding, 1), (True, sharding, 2))),
    *((2, _collectives, sharding, *REDUCTIONS) for sharding in SHARDINGS),
    *((2, _collectives, sharding, *GATHERS) for sharding in ("full", "optimizer")),
    *((size, _bfloat16, sharding) for size in (1, 2) for sharding in ("none", "full")),
    (1, _one_rank),
    *((4 if sharding == "hybrid" else 2, _resharding, sharding) for sharding, _ in RESHARDING),
    (2, _partial),
    (2, _no_gradients),
    most=20,
)
