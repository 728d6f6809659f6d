# SPDX-License-Identifier: Apache-2.0
"""What training steps compute in place on processors gives what it gives elsewhere."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.cross_entropy import IGNORED, vocab_parallel_cross_entropy
from parallel.dropout import fold_in, keep_mask, keep_scale, keyed_dropout
from parallel.first_order import first_order, in_place
from parallel.huge_pages import large_zeros
from parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from parallel.mesh import SINGLE
from parallel.simulated_device import standing_for_gpu
from parallel.weight_gradients import WeightGradientQueue, add_in_place, deferring
from tests.parallel.support import Operators

CPU = torch.device("cpu")
KEYS = fold_in(torch.arange(6), 3)


def test_where_something_is_computed_in_place() -> None:
    x = torch.zeros(2)
    assert not in_place(x)
    with first_order():
        assert in_place(x)
        assert not in_place(x.bfloat16())
        assert not in_place(x.to("meta"))
        with torch.no_grad():
            assert not in_place(x)
        with standing_for_gpu():
            assert not in_place(x)
        with mock.patch("torch.compiler.is_compiling", return_value=True):
            assert not in_place(x)
    assert not in_place(x)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.9])
def test_what_elements_are_multiplied_with(probability: float) -> None:
    scale = keep_scale(KEYS, 40, probability)
    kept = keep_mask(KEYS, 40, probability)
    assert scale.dtype == torch.float32
    assert torch.equal(scale, kept.float() * (1.0 / (1.0 - probability)))


@pytest.mark.parametrize("keep_nothing", [False, True])
@pytest.mark.parametrize("probability", [0.0, 0.25])
def test_dropout_added_to_a_residual(probability: float, keep_nothing: bool) -> None:
    x, residual, gradient = torch.randn(6, 5), torch.randn(6, 5), torch.randn(6, 5)

    def results() -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, residual)]
        out = keyed_dropout(leaves[0], probability, KEYS, keep_nothing=keep_nothing, residual=leaves[1])
        return out.detach(), *torch.autograd.grad(out, leaves, gradient)

    with first_order():
        found = results()
    torch.testing.assert_close(found, results())
    torch.testing.assert_close(found[0], residual + keyed_dropout(x, probability, KEYS))


def test_a_weight_gradient_is_added_where_it_is() -> None:
    layer = ColumnParallelLinear(4, 3, init_std=1.0)
    x, gradient = torch.randn(5, 4, requires_grad=True), torch.randn(5, 3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    expected = torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], gradient)
    layer.weight.grad = kept = torch.randn(3, 4)
    before = kept.clone()
    add_in_place(layer.weight)
    for _ in range(2):
        with first_order():
            out = layer(x)
            out.backward(gradient)
    torch.testing.assert_close(out, F.linear(x, layer.weight, layer.bias))
    assert layer.weight.grad is kept
    torch.testing.assert_close(kept, before + 2 * expected[1])
    torch.testing.assert_close((x.grad, layer.bias.grad), (2 * expected[0], 2 * expected[2]))
    assert torch.autograd.grad(layer(x), layer.weight, gradient)[0].equal(expected[1]), "outside, it is given"


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_a_gradient_are_added_where_it_is(tied: bool) -> None:
    table, ids, gradient = VocabParallelEmbedding(7, 8, 3, init_std=1.0), torch.tensor([5, 0, 5]), torch.randn(3, 3)
    table.tied = tied
    table.weight.grad = kept = torch.randn(8, 3)
    expected = kept.clone().index_add_(0, ids, gradient).index_add_(0, ids, gradient)
    add_in_place(table.weight)
    with first_order(), deferring(None if tied else WeightGradientQueue()), Operators() as operators:
        for _ in range(2):
            table(ids).backward(gradient)
    assert table.weight.grad is kept
    torch.testing.assert_close(kept, expected)
    assert operators.count("embedding_dense_backward") == 0, "no gradient of the whole table is made"


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("vocabulary", [11, 16])
def test_cross_entropy(vocabulary: int, scale: float) -> None:
    """Also where padding is large, and where the probability of a label is below the least number."""
    labels, weights = torch.tensor([0, 10, IGNORED, 5]), torch.randn(4)
    logits = torch.randn(4, 16) * scale
    logits[:, 11:] += 3 * scale

    def losses_and_gradient() -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        losses = vocab_parallel_cross_entropy(leaf * 1.0, labels, vocabulary, SINGLE, overwrite=True)
        return losses.detach(), torch.autograd.grad((losses * weights).sum(), leaf)[0]

    with first_order():
        found = losses_and_gradient()
    torch.testing.assert_close(found, losses_and_gradient())
    assert found[0].isfinite().all()
    assert not found[1][:, vocabulary:].any()
    assert not found[1][2].any()


def test_logits_that_others_read_stay() -> None:
    """Such as those of a loss with a term for their size."""
    labels, start = torch.tensor([0, 4, IGNORED]), torch.randn(3, 6)

    def losses_and_gradient() -> tuple[Tensor, Tensor]:
        leaf = start.clone().requires_grad_()
        logits = leaf * 1.0
        losses = vocab_parallel_cross_entropy(logits, labels, 5, SINGLE) + logits[:, :5].logsumexp(1).square()
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]

    with first_order():
        found = losses_and_gradient()
    assert all(map(torch.equal, found, losses_and_gradient()))


def _product(x: Tensor) -> Tensor:
    layer = ColumnParallelLinear(6, 3, init_std=1.0)
    layer.weight.grad = torch.zeros(3, 6)
    add_in_place(layer.weight)
    return layer(x)


def _loss(x: Tensor) -> Tensor:
    return vocab_parallel_cross_entropy(x * 1.0, torch.tensor([1, 2]), 6, SINGLE, overwrite=True)


@pytest.mark.parametrize("function", [_product, _loss])
def test_a_second_derivative_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    """What it would be made of is gone."""
    x = torch.randn(2, 6, requires_grad=True)
    with first_order():
        (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_large_zeros() -> None:
    for size in (0, 1, 2**21 + 3):
        zeros = large_zeros(size, device=CPU, dtype=torch.float32)
        assert zeros.shape == (size,)
        assert not zeros.any()
        zeros += 1
        assert zeros.sum() == size
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert zeros.data_ptr() % 2**21 == 0, "it begins with a huge page"
    assert large_zeros(2**22, device=torch.device("meta")).is_meta


def test_large_zeros_where_there_are_no_huge_pages() -> None:
    with mock.patch("mmap.MADV_HUGEPAGE", -1, create=True):  # which no system knows
        assert large_zeros(2**21, device=CPU).sum() == 0
