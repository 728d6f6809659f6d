# SPDX-License-Identifier: Apache-2.0
"""No intermediate of any integer function leaves 64 bits, nor 32 where a kernel holds it: by interval analysis."""

from __future__ import annotations

from math import isqrt

import pytest
import torch

from megatron_bert.ibert import bounds, exponential, gelu, layer_norm, softmax, tanh
from megatron_bert.ibert.fixed_point import (
    LARGEST_ACCUMULATOR,
    LARGEST_SHORT,
    Dyadic,
    Factor,
    requantize,
    wide_requantize,
)
from tests.megatron_bert.ibert.intervals import Interval, bits, watched

#: Any factor of the package that shifts to the right.
ANY = Factor(Interval(0, LARGEST_SHORT), Interval(1, 30))
SHORT = (-(2**15), 2**15 - 1)


def test_accumulators_have_29_bits():
    assert LARGEST_ACCUMULATOR >= 12288 * 255 * 127 + 2**27 - 1


def test_requantization_has_31_bits():
    for a in (LARGEST_ACCUMULATOR, 2**29):  # an accumulator; and N x - s1 or sums of attention
        for shift in range(1, 31):
            with watched():
                result = requantize(Interval(-a, a), Factor(Interval(0, LARGEST_SHORT), Interval(shift, shift)), *SHORT)
            assert Interval.widest <= 31
            assert (result.low, result.high) >= SHORT


def test_wide_requantization_has_53_bits():
    with watched():
        number = Dyadic(Interval(0, 2**23), Interval(1, 52))
        wide_requantize(Interval(-LARGEST_ACCUMULATOR, LARGEST_ACCUMULATOR), number, -(2**24), 2**24)
    # float64 holds all integers of 53 bits, so it carries the same sum.
    assert Interval.widest == 53


def test_exponential_has_25_bits():
    with watched():
        result = exponential.exponential(Interval(0, exponential.LARGEST_ARGUMENT))
    assert Interval.widest <= 26
    assert result.low >= 0
    assert result.high == exponential.ONE


@pytest.mark.parametrize("exponent", gelu.EXPONENTS)
def test_gelu_has_16_bits_between_products(exponent, monkeypatch):
    """Of every argument: intervals forget that its terms belong together."""
    whole = gelu.multiply_short

    def multiplied(n, multiplier):
        assert int(n.abs().max()) <= LARGEST_SHORT
        assert int(torch.as_tensor(multiplier).abs().max()) <= LARGEST_SHORT
        return whole(n, multiplier)

    monkeypatch.setattr(gelu, "multiply_short", multiplied)
    argument = torch.arange(-LARGEST_SHORT, LARGEST_SHORT + 1)
    assert int(gelu.gelu(argument, exponent).abs().max()) <= LARGEST_SHORT


def test_tanh_has_30_bits():
    with watched():
        result = tanh.tanh(Interval(-tanh.LARGEST_ARGUMENT, tanh.LARGEST_ARGUMENT))
    assert Interval.widest <= 31
    assert (result.low, result.high) == (-tanh.LARGEST, tanh.LARGEST)


@pytest.mark.parametrize("shift", [-16, -3, 0, 5])
def test_softmax_has_32_bits_without_sign(shift):
    scores = Interval(-(2**24) + 1, 2**24 - 1)
    with watched():
        result = softmax.softmax_numerators(scores, softmax.ScoreFactor(2**16 - 1, shift), None)
    assert Interval.widest <= 32
    assert (result.low, result.high) == (0, 255)


def test_means_have_31_bits_and_38_once_a_row():
    sums = 255 * bounds.MOST_KEYS
    assert sums < 2**22
    assert 127 * sums < 2**29
    with watched():
        length = 22
        inverse = Interval(1 << (length + 15), 1 << (length + 15)) // Interval(2 ** (length - 1), 2**length - 1)
        assert inverse.high <= 2**16
        multiplier = inverse * (2**15 - 1)
        assert bits(multiplier.high) <= 31
        assert (multiplier >> 20).high < 2**11
    assert Interval.widest <= 38


@pytest.mark.parametrize(("columns", "bits_of_stream"), [(1024, 16), (2560, 16), (8192, 16), (4096, 12)])
def test_layer_norm_holds_64_bits_a_row_and_32_an_element(columns, bits_of_stream, monkeypatch):
    monkeypatch.setattr(layer_norm, "square_root", lambda n: Interval(0, isqrt(n.high)))
    limit = 2 ** (bits_of_stream - 1) - 1
    assert columns * limit < 2**28
    with watched():
        total, squares = layer_norm.moments(Interval(-limit, limit, columns))
        deviation = layer_norm.deviation(total, squares, columns, Interval(0, 2**60))
    assert Interval.widest <= 62
    assert deviation.high < 2**31
    for shift in (1, 9, 21):
        number = Factor(Interval(2**14, LARGEST_SHORT), Interval(shift, shift))
        with watched():
            normal = layer_norm.normalized(Interval(-limit, limit), total, number, columns)
        assert Interval.widest <= 31
        assert max(bits(normal.low), bits(normal.high)) <= 15
        for last in (1, 24):
            most = 2**30 - 2**24
            gain = Interval(-LARGEST_SHORT, LARGEST_SHORT)
            parameters = layer_norm.Affine(gain, Interval(-most, most), Interval(last, last))
            with watched():
                layer_norm.scaled(normal, parameters)
            assert Interval.widest <= 31
