# SPDX-License-Identifier: Apache-2.0
"""Every collective and its gradient against sums and slices written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel import collectives
from parallel.mesh import SINGLE, TensorParallel
from tests.parallel.support import assert_sums_equal, uniform
from tests.worlds import make_tensor_parallel, run_world

# Function -> how the outputs of all ranks follow from the inputs of all ranks. The gradient of a function is the
# forward of its conjugate, so one table serves both directions.
T, H = 8, 6


def _same(x: list[Tensor], rank: int) -> Tensor:
    return x[rank]


def _total(x: list[Tensor], rank: int) -> Tensor:
    return torch.stack(x).sum(0)


def _concatenated(dim):
    return lambda x, rank: torch.cat(x, dim)


def _slice(dim):
    return lambda x, rank: x[rank].chunk(len(x), dim)[rank]


def _slice_of_total(x: list[Tensor], rank: int) -> Tensor:
    return torch.stack(x).sum(0).chunk(len(x), 0)[rank]


CASES = {
    "copy_to_ranks": ({}, _same, _total),
    "reduce_from_ranks": ({}, _total, _same),
    "gather_from_ranks": ({}, _concatenated(-1), _slice(-1)),
    "gather_from_ranks-0": ({"dim": 0}, _concatenated(0), _slice(0)),
    "gather_from_ranks-1": ({"dim": 1}, _concatenated(1), _slice(1)),
    "all_gather_tokens": ({}, _concatenated(0), _slice_of_total),
    "reduce_scatter_tokens": ({}, _slice_of_total, _concatenated(0)),
}


def _check(case: str) -> None:
    keywords, forward, backward = CASES[case]
    function = getattr(collectives, case.split("-")[0])
    tp = make_tensor_parallel()
    # Two leading dimensions, and not contiguous in memory: collectives must copy such tensors themselves.
    inputs = [uniform(T, H * tp.size, 4, seed=rank).transpose(1, 2) for rank in range(tp.size)]
    before = [x.clone() for x in inputs]
    mine = inputs[tp.rank].requires_grad_()
    output = function(mine, tp, **keywords)
    expected = forward([x.detach() for x in inputs], tp.rank)
    assert_sums_equal(output.detach(), expected, tp.size)
    torch.testing.assert_close(mine.detach(), before[tp.rank], rtol=0, atol=0)

    # A different gradient on every rank shows who contributes to what.
    shape = [output.shape[i] for i in (0, 2, 1)]
    gradients = [uniform(*shape, seed=100 + rank).transpose(1, 2) for rank in range(tp.size)]
    kept = gradients[tp.rank].clone()
    output.backward(gradients[tp.rank])
    assert mine.grad is not None
    assert mine.grad.shape == mine.shape
    assert_sums_equal(mine.grad, backward(gradients, tp.rank), tp.size)
    torch.testing.assert_close(gradients[tp.rank], kept, rtol=0, atol=0)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradient(case, size):
    run_world(size, _check, case)


@pytest.mark.parametrize("name", sorted({case.split("-")[0] for case in CASES}))
def test_a_world_of_one_returns_its_input(name):
    x = torch.randn(4, 3)
    assert getattr(collectives, name)(x, SINGLE) is x


def _loss(w: Tensor, v: Tensor, x: Tensor, tp: TensorParallel, sequence: bool) -> Tensor:
    """sum over tokens of |V tanh(W x)|^2 with W, V divided: the regions must open and close in pairs."""
    enter = collectives.all_gather_tokens if sequence else collectives.copy_to_ranks
    leave = collectives.reduce_scatter_tokens if sequence else collectives.reduce_from_ranks
    inner = torch.tanh(enter(x, tp) @ w.t())
    return leave(inner @ v.t(), tp).square().sum()


def _pairs(sequence: bool) -> None:
    tp = make_tensor_parallel(sequence=sequence)
    w, v, x = uniform(8, 6, seed=1), uniform(6, 8, seed=2), uniform(T, 6, seed=3)
    whole = [tensor.clone().requires_grad_() for tensor in (w, v, x)]
    torch.autograd.backward(_loss(*whole, SINGLE, sequence))
    own_w = w.chunk(tp.size, 0)[tp.rank].clone().requires_grad_()
    own_v = v.chunk(tp.size, 1)[tp.rank].clone().requires_grad_()
    own_x = (x.chunk(tp.size, 0)[tp.rank] if sequence else x).clone().requires_grad_()
    torch.autograd.backward(_loss(own_w, own_v, own_x, tp, sequence))
    # A gradient is nested sums of 8, 6 and 8 products, in all at most 8 * 6 * 8 terms of at most 2: off by at most
    # (8 + 6 + 8) eps * 768 on either side, less than what 64 terms of 4 are allowed.
    assert_sums_equal(own_w.grad, whole[0].grad.chunk(tp.size, 0)[tp.rank], 64, 4.0)
    assert_sums_equal(own_v.grad, whole[1].grad.chunk(tp.size, 1)[tp.rank], 64, 4.0)
    expected = whole[2].grad.chunk(tp.size, 0)[tp.rank] if sequence else whole[2].grad
    assert_sums_equal(own_x.grad, expected, 64, 4.0)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_a_divided_region_has_the_gradients_of_the_whole(size, sequence):
    run_world(size, _pairs, sequence)
