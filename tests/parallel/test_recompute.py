# SPDX-License-Identifier: Apache-2.0
"""Recomputation changes what is kept, never a result."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.dropout import fold_in
from parallel.mesh import TensorParallel
from parallel.recompute import recomputed
from parallel.sharding import initialize, local_tensor
from tests.parallel.support import Living, Operators, ToyLayer, own_share, uniform
from tests.worlds import make_tensor_parallel, run_world

MODES = ("none", "selective", "full")
T, SIZE, INNER = 8, 6, 8
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")


def _run(mode: str, sequence: bool) -> tuple[dict[str, Tensor], Operators, Operators]:
    """Output and gradients of a layer, and the operators of forward and backward."""
    tp = make_tensor_parallel(sequence=sequence)
    layer, x, keys = _layer(mode, tp)
    with Operators() as forward:
        out = layer(x, keys)
    with Operators() as backward:
        out.square().sum().backward()
    parameters = {name: local_tensor(p.grad) for name, p in layer.named_parameters() if p.grad is not None}
    assert len(parameters) == len(list(layer.parameters()))
    return {"output": out.detach(), "input": x.grad, **parameters}, forward, backward


def _layer(mode: str, tp: TensorParallel) -> tuple[ToyLayer, Tensor, Tensor]:
    layer = ToyLayer(SIZE, INNER, tp=tp, recompute=mode)
    initialize(layer, 1)
    x = uniform(T, SIZE, seed=2, dtype=torch.float32)
    x = (own_share(x, tp) if tp.sequence else x).requires_grad_()
    return layer, x, fold_in(torch.arange(T), 3)


def _equal(sequence: bool) -> None:
    expected = _run("none", sequence)[0]
    for mode in MODES[1:]:
        results = _run(mode, sequence)[0]
        assert results.keys() == expected.keys()
        for name, result in results.items():
            assert result.equal(expected[name]), (mode, name)


@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
@pytest.mark.parametrize("size", [1, 2])
def test_outputs_and_gradients_are_equal_bit_for_bit(size, sequence):
    run_world(size, _equal, sequence)


def _products() -> dict[str, tuple[int, int]]:
    runs = {mode: _run(mode, False) for mode in MODES}
    return {mode: (run[1].count("mm", "addmm"), run[2].count("mm", "addmm")) for mode, run in runs.items()}


@pytest.mark.parametrize("size", [1, 2])
def test_products_that_run_again(size):
    for products in run_world(size, _products):
        # Two products forward; two each backward. Selective repeats none.
        assert products["none"] == (2, 4)
        assert products["selective"] == (2, 4)
        # Full repeats the first; nothing in the backward pass needs the result of the second.
        assert products["full"] == (2, 5)


def _communication(sequence: bool) -> dict[str, tuple[list[str], list[str]]]:
    runs = {mode: _run(mode, sequence) for mode in MODES}
    return {
        mode: tuple([name for name in operators.names if name in COLLECTIVES] for operators in run[1:])
        for mode, run in runs.items()
    }


def test_communication_that_runs_again():
    for runs in run_world(2, _communication, False):
        # Forward: the closing sum. Backward: the sum of the input gradient. No mode repeats the closing sum.
        assert runs == dict.fromkeys(MODES, (["all_reduce"], ["all_reduce"]))


def test_communication_that_runs_again_under_sequence_parallelism():
    gather, scatter = "all_gather_into_tensor", "reduce_scatter_tensor"
    for runs in run_world(2, _communication, True):
        # Backward: the output's gradient is gathered, the input gathered again, the input's gradient scattered.
        plain = [gather, gather, scatter]
        assert runs["none"] == ([gather, scatter], plain)
        assert runs["selective"] == ([gather, scatter], plain)
        # Full repeats the opening gather for the activation function's input, never the closing scatter.
        assert runs["full"][0] == [gather, scatter]
        assert sorted(runs["full"][1]) == sorted([gather, *plain])


def _kept_bytes(sequence: bool = False) -> dict[str, int]:
    tp = make_tensor_parallel(sequence=sequence)
    kept = {}
    for mode in MODES:
        layer, x, keys = _layer(mode, tp)
        with Living() as living:
            out = layer(x, keys)
        # The threads of finished collectives let go of their tensors a moment later: a barrier passes behind them.
        dist.barrier()
        gc.collect()
        kept[mode] = living.bytes_beside(out)
    return kept


@pytest.mark.parametrize("size", [1, 2])
def test_full_keeps_nothing_and_selective_less_than_all(size):
    for kept in run_world(size, _kept_bytes):
        assert kept["full"] == 0  # beside inputs
        assert 0 < kept["selective"] < kept["none"]
        # The first product's result is [T, INNER / size], and it is needed.
        assert kept["selective"] >= T * INNER // size * 4


@pytest.mark.parametrize("size", [2, 4])
def test_selective_keeps_less_than_all_under_sequence_parallelism(size):
    for kept in run_world(size, _kept_bytes, True):
        assert kept["full"] == 0
        assert kept["selective"] < kept["none"]


def test_nothing_is_kept_without_gradients():
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sin()

    with torch.no_grad():
        out = recomputed(function, "full", torch.ones(3, requires_grad=True))
    assert out.grad_fn is None
    assert calls == [1]


@pytest.mark.parametrize("at", ["selective", "full"])
@pytest.mark.parametrize("mode", MODES)
def test_the_function_runs_again_in_the_backward_pass_at_its_mode(mode, at):
    calls = []

    def function(x: Tensor, *, power: int) -> Tensor:
        calls.append(1)
        return x.sin() ** power

    x = torch.ones(3, requires_grad=True)
    recomputed(function, mode, x, at=at, power=2).sum().backward()
    assert len(calls) == (2 if mode == at else 1)
    torch.testing.assert_close(x.grad, 2 * torch.ones(3).sin() * torch.ones(3).cos())
