# SPDX-License-Identifier: Apache-2.0
"""Cross entropy over a divided vocabulary against float64, and against Megatron-LM's definition of it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.cross_entropy import IGNORED, vocab_parallel_argmax, vocab_parallel_cross_entropy
from parallel.mesh import SINGLE
from tests.parallel.support import Operators, own_share, uniform
from tests.worlds import Together, make_tensor_parallel, run_world

SIZES = pytest.mark.parametrize("size", [1, 2, 4])
PADDED = 16
#: 11 real columns of 16: at size 4 the last rank holds padding only and the third is mixed; 16: no padding.
VOCABULARIES = pytest.mark.parametrize("vocabulary", [11, 16])
EPS32 = torch.finfo(torch.float32).eps

# Label 0, the last real label, and one ignored slot; one label on every rank of 4 where there is one.
LABELS = torch.tensor([0, 10, IGNORED, 5, 3, 8, 0])


def _logits(scale: float) -> Tensor:
    logits = uniform(len(LABELS), PADDED, seed=1, dtype=torch.float32) * scale
    logits[:, 11:] += 3 * scale  # large where padding may be: it must not count
    return logits


def _reference(logits: Tensor, vocabulary: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Losses in float64, and the gradient of their weighted sum; zero in columns of padding."""
    whole = logits.double().requires_grad_()
    rows = torch.arange(len(LABELS))
    losses = -whole[:, :vocabulary].log_softmax(dim=1)[rows, LABELS.clamp(min=0)]
    losses = losses.masked_fill(LABELS == IGNORED, 0.0)
    (losses * weights).sum().backward()
    assert whole.grad is not None
    return losses.detach(), whole.grad


def _loss_tolerance(scale: float) -> float:
    # float32 differences z - max round to eps * 8 scale at most (logits are within 4 scale), as does the label's; the
    # sum of 16 exponentials and its logarithm add less than 16 eps.
    return EPS32 * (2 * 8 * scale + 16)


def _check(vocabulary: int, scale: float, dtype: torch.dtype) -> None:
    tp = make_tensor_parallel()
    logits, weights = _logits(scale).to(dtype), uniform(len(LABELS), seed=2, dtype=torch.float32)
    expected, gradient = _reference(logits, vocabulary, weights.double())
    own = own_share(logits, tp, 1).requires_grad_()
    losses = vocab_parallel_cross_entropy(own, LABELS, vocabulary, tp)
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    tolerance = _loss_tolerance(scale)
    torch.testing.assert_close(losses.detach().double(), expected, rtol=0, atol=tolerance)
    assert losses[LABELS == IGNORED].eq(0).all()
    (losses * weights).sum().backward()
    assert own.grad is not None
    assert own.grad.dtype == dtype
    # A probability is off by the error of its exponent at most; in bfloat16 the result is rounded besides.
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    torch.testing.assert_close(own.grad.double(), own_share(gradient, tp, 1), rtol=0, atol=tolerance + rounding)
    assert own.grad[LABELS == IGNORED].eq(0).all()
    first = tp.rank * own.shape[1]
    padding = torch.arange(first, first + own.shape[1]) >= vocabulary
    assert own.grad[:, padding].eq(0).all()


DTYPES = [torch.float32, torch.bfloat16]
CHECKS = Together(
    *((size, _check, *case) for size in (1, 2, 4) for case in product((11, 16), (3.0,), DTYPES)),
    *((size, _check, 11, 1e4, torch.float32) for size in (1, 2, 4)),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@VOCABULARIES
@SIZES
def test_loss_and_gradient(size, vocabulary, dtype):
    CHECKS(size, _check, vocabulary, 3.0, dtype)


@SIZES
def test_extreme_logits_are_stable(size):
    CHECKS(size, _check, 11, 1e4, torch.float32)


def _megatron(vocabulary: int) -> tuple[Tensor, Tensor]:
    """The definition step by step with plain collectives, and ours."""
    tp = make_tensor_parallel()
    logits = own_share(_logits(3.0), tp, 1)
    columns = logits.shape[1]
    real = max(0, min(columns, vocabulary - tp.rank * columns))
    ours = vocab_parallel_cross_entropy(logits, LABELS, vocabulary, tp)

    highest = logits[:, :real].amax(dim=1) if real else torch.full((len(LABELS),), -torch.inf)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    shifted = logits - highest[:, None]
    local = LABELS - tp.rank * columns
    elsewhere = (local < 0) | (local >= columns)
    predicted = shifted.gather(1, local.masked_fill(elsewhere, 0)[:, None])[:, 0].masked_fill(elsewhere, 0.0)
    dist.all_reduce(predicted)
    total = shifted[:, :real].exp().sum(dim=1)
    dist.all_reduce(total)
    return ours, total.log() - predicted


MEGATRON = Together(*((size, _megatron, vocabulary) for size in (2, 4) for vocabulary in (11, 16)))


@VOCABULARIES
@pytest.mark.parametrize("size", [2, 4])
def test_megatron_definition(size, vocabulary):
    real = LABELS != IGNORED
    for ours, theirs in MEGATRON(size, _megatron, vocabulary):
        # The same float32 operations; only the order of the sums over ranks may differ.
        torch.testing.assert_close(ours[real], theirs[real], rtol=4 * EPS32, atol=4 * EPS32)


def _losses(logits: Tensor, labels: Tensor, vocabulary: int) -> Tensor:
    tp = make_tensor_parallel()
    return vocab_parallel_cross_entropy(own_share(logits, tp, 1), labels, vocabulary, tp)


def test_the_loss_does_not_depend_on_the_padding():
    logits = uniform(5, 12, seed=1, dtype=torch.float32)
    labels = torch.tensor([0, 9, 4, 7, 2])
    wide = torch.cat((logits[:, :10], torch.full((5, 6), 50.0)), dim=1)
    expected = vocab_parallel_cross_entropy(logits, labels, 10, SINGLE)
    for losses in run_world(4, _losses, wide, labels, 10):
        torch.testing.assert_close(losses, expected, rtol=0, atol=_loss_tolerance(1.0))


def test_every_rank_has_the_same_bits():
    first, *others = run_world(4, _losses, _logits(3.0), LABELS, 11)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


def _communication() -> list[tuple[int, int]]:
    tp = make_tensor_parallel()
    logits = own_share(_logits(3.0), tp, 1).requires_grad_()
    with Operators() as forward:
        losses = vocab_parallel_cross_entropy(logits, LABELS, 11, tp)
    with Operators() as backward:
        losses.sum().backward()
    return [(mode.count("all_reduce"), mode.count("wait_tensor")) for mode in (forward, backward)]


def test_two_reductions_forward_and_none_backward():
    assert run_world(2, _communication) == [[(2, 2), (0, 0)]] * 2


def test_all_slots_ignored():
    labels = torch.full((3,), IGNORED)
    for size in (1, 2):
        for losses in run_world(size, _losses, uniform(3, 8, seed=1, dtype=torch.float32), labels, 7):
            assert losses.eq(0).all()


def _argmax(logits: Tensor, vocabulary: int) -> Tensor:
    tp = make_tensor_parallel()
    return vocab_parallel_argmax(own_share(logits, tp, 1), vocabulary, tp)


@VOCABULARIES
@SIZES
def test_argmax(size, vocabulary):
    logits = _logits(3.0)
    expected = logits[:, :vocabulary].argmax(dim=1)
    assert expected.unique().numel() > 2
    for result in run_world(size, _argmax, logits, vocabulary):
        assert result.equal(expected)


@SIZES
def test_argmax_takes_the_lowest_of_equals(size):
    logits = torch.zeros(5, 16)
    logits[0, [3, 5]] = 1.0  # on one rank of 2, on two of 4
    logits[1, [2, 9, 10]] = 1.0  # on both ranks of 2
    logits[2] = -7.0  # all equal
    logits[3, [4, 6]] = 1.0  # on one rank at any size
    logits[4, [10, 11]] = 1.0  # the second is padding
    for result in run_world(size, _argmax, logits, 11):
        assert result.tolist() == [3, 2, 0, 4, 10]
