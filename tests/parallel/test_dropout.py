# SPDX-License-Identifier: Apache-2.0
"""Keyed dropout: right rate, independent masks, and nothing that depends on how tensors are cut.

The statistical bounds are six standard deviations of what truly random masks would show. Keys are fixed, so a test
that passes always passes.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from parallel.dropout import fold_in, hashed_columns, keep_mask, keyed_dropout

ROWS, COLUMNS = 512, 768
DEVIATIONS = 6.0
PINNED = ["1000011001101010", "0011010110010001", "1101111011011010", "1000001100000000"]
RATES = pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])


def _keys(seed: int = 1, rows: int = ROWS, step: int = 0, layer: int = 0) -> Tensor:
    """Keys the way a model builds them: small consecutive numbers folded one after the other."""
    position = torch.arange(rows) % 128
    sample = torch.arange(rows) // 128 + 4 * step
    return fold_in(fold_in(fold_in(sample, seed), position), layer)


def _correlation(a: Tensor, b: Tensor) -> float:
    """Sample correlation of two masks; its standard deviation is 1 / sqrt(n) for independent ones."""
    pair = torch.stack((a.flatten(), b.flatten())).double()
    return float(torch.corrcoef(pair)[0, 1])


def _assert_independent(a: Tensor, b: Tensor) -> None:
    assert abs(_correlation(a, b)) < DEVIATIONS / math.sqrt(a.numel())


@RATES
def test_rate(probability):
    kept = keep_mask(_keys(), COLUMNS, probability).double()
    deviation = math.sqrt(probability * (1 - probability) / kept.numel())
    assert abs(float(kept.mean()) - (1 - probability)) < DEVIATIONS * deviation


@RATES
@pytest.mark.parametrize("dim", [0, 1], ids=["columns", "rows"])
def test_rate_of_every_row_and_column(dim, probability):
    kept = keep_mask(_keys(), COLUMNS, probability).double().sum(dim)
    n = ROWS if dim == 0 else COLUMNS
    # Each count is binomial; the sum of their squared standardized values has mean m and variance near 2m.
    squares = (kept - n * (1 - probability)).square() / (n * probability * (1 - probability))
    assert abs(float(squares.sum()) - len(kept)) < DEVIATIONS * math.sqrt(2 * len(kept))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 16, 64, 128, 256])
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_rows_and_columns_are_independent(lag, probability):
    kept = keep_mask(_keys(), COLUMNS, probability)
    _assert_independent(kept[lag:], kept[:-lag])
    _assert_independent(kept[:, lag:], kept[:, :-lag])
    _assert_independent(kept[lag:, lag:], kept[:-lag, :-lag])


def test_pairs_of_rows_and_columns_are_independent():
    # Over all pairs at once: correlations of m independent series of n numbers have variance 1/n, so that the mean of
    # n r^2 over the m (m - 1) / 2 pairs is 1, with a standard deviation of about sqrt(2 / pairs).
    kept = keep_mask(_keys(), COLUMNS, 0.5).double()
    for series in (kept, kept.t()):
        m, n = series.shape
        correlations = torch.corrcoef(series)[*torch.triu_indices(m, m, 1)]
        pairs = correlations.numel()
        # Sample correlations of n numbers have variance 1 / (n - 1).
        assert abs(float((n - 1) * correlations.square().mean()) - 1) < DEVIATIONS * math.sqrt(2 / pairs)


@pytest.mark.parametrize("other", [{"seed": 2}, {"layer": 1}, {"step": 1}, {"seed": 2**40}], ids=str)
def test_seeds_layers_and_steps_are_independent(other):
    _assert_independent(keep_mask(_keys(), COLUMNS, 0.5), keep_mask(_keys(**other), COLUMNS, 0.5))


def test_no_two_keys_are_alike():
    # Among the 64-bit keys of 2^18 (seed, sample, position, layer) a repeat has probability 2^36 / 2^64.
    keys = torch.stack([_keys(seed, layer=layer) for seed in range(16) for layer in range(32)])
    assert keys.unique().numel() == keys.numel() == 2**18


def test_columns_are_hashed_once():
    held = hashed_columns(COLUMNS, torch.device("cpu"))
    assert hashed_columns(COLUMNS, torch.device("cpu")) is held
    kept = keep_mask(_keys(), COLUMNS, 0.5)
    assert keep_mask(_keys(), COLUMNS, 0.5, hashed=held).equal(kept)
    numbers = torch.arange(COLUMNS, dtype=torch.int32)
    assert keep_mask(_keys(), numbers, 0.5).equal(kept)
    for other in range(200):  # widths come and go
        hashed_columns(other + 1, torch.device("cpu"), first_column=3)
    assert keep_mask(_keys(), COLUMNS, 0.5).equal(kept)


def test_keys_may_lie_in_any_order_in_memory():
    keys = _keys(rows=24).view(4, 6)
    turned = keep_mask(keys.t(), 16, 0.5)
    assert not keys.t().is_contiguous()
    assert turned.equal(keep_mask(keys, 16, 0.5).transpose(0, 1))


def test_fold_in_is_order_sensitive():
    key = torch.tensor([0, 1, 2])
    assert (fold_in(fold_in(key, 1), 2) != fold_in(fold_in(key, 2), 1)).all()
    assert fold_in(key, torch.tensor([5, 6, 7]))[1] == fold_in(key[1:2], 6)


def test_the_mask_is_pinned():
    # A run resumed with a newer version must drop the same elements: this mask may never change.
    keys = fold_in(torch.arange(4), 1234)
    rows = keep_mask(keys, 16, 0.5).int().tolist()
    assert ["".join(map(str, row)) for row in rows] == PINNED


def test_cutting_rows_or_columns_cuts_the_mask():
    keys = _keys(rows=32)
    whole = keep_mask(keys, 24, 0.3)
    assert keep_mask(keys[8:16], 24, 0.3).equal(whole[8:16])
    assert keep_mask(keys, 6, 0.3, first_column=12).equal(whole[:, 12:18])
    assert keep_mask(keys.view(4, 8), 24, 0.3).equal(whole.view(4, 8, 24))


def test_masks_are_nested():
    # Raising the rate drops more elements and keeps none that was dropped.
    keys = _keys()
    low, high = (keep_mask(keys, COLUMNS, probability) for probability in (0.1, 0.3))
    assert (low | ~high).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_output_and_gradient_use_one_mask(dtype):
    keys = _keys(rows=64)
    x = torch.randn(64, 48).abs().add(0.1).to(dtype).requires_grad_()
    out = keyed_dropout(x, 0.25, keys)
    kept = keep_mask(keys, 48, 0.25)
    assert out.dtype == dtype
    assert (out != 0).equal(kept)
    torch.testing.assert_close(out.detach(), torch.where(kept, x.detach() * (4 / 3), 0))
    gradient = torch.randn(64, 48).to(dtype)
    out.backward(gradient)
    torch.testing.assert_close(x.grad, torch.where(kept, gradient * (4 / 3), 0))


def test_probability_zero_returns_the_input():
    x = torch.randn(4, 8)
    assert keyed_dropout(x, 0.0, _keys(rows=4)) is x
    assert keep_mask(_keys(), COLUMNS, 0.0).all()


def test_the_expectation_is_kept():
    x = torch.ones(ROWS, COLUMNS)
    mean = float(keyed_dropout(x, 0.1, _keys()).double().mean())
    # One element is 1 / 0.9 or 0: its standard deviation is sqrt(0.1 / 0.9).
    assert abs(mean - 1.0) < DEVIATIONS * math.sqrt(0.1 / 0.9 / x.numel())


def test_torch_random_state_is_not_used():
    before = torch.get_rng_state()
    keyed_dropout(torch.randn(4, 8, generator=torch.Generator()), 0.5, _keys(rows=4))
    assert torch.get_rng_state().equal(before)


def test_compiled_masks_are_the_eager_ones():
    compiled = torch.compile(keyed_dropout, backend="aot_eager", fullgraph=True)
    keys = _keys(rows=64)
    x = torch.randn(64, 48)
    eager_x, compiled_x = (x.clone().requires_grad_() for _ in range(2))
    eager, out = keyed_dropout(eager_x, 0.25, keys), compiled(compiled_x, 0.25, keys)
    torch.testing.assert_close(out, eager, rtol=0, atol=0)
    gradient = torch.randn(64, 48)
    eager.backward(gradient)
    out.backward(gradient)
    torch.testing.assert_close(compiled_x.grad, eager_x.grad, rtol=0, atol=0)


def test_traced_code_drops_the_same_elements():
    traced = torch.jit.trace(lambda x, keys: keyed_dropout(x, 0.3, keys), (torch.ones(4, 8), _keys(rows=4)))
    for rows, columns in ((4, 8), (6, 12)):
        x, keys = torch.ones(rows, columns), _keys(2, rows)
        assert traced(x, keys).equal(keyed_dropout(x, 0.3, keys))
