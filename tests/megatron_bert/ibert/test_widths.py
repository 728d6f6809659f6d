"""No intermediate of any integer function leaves 64 bits, nor 32 where a kernel holds it: by interval analysis."""

from __future__ import annotations

from math import isqrt

import pytest

from megatron_bert.ibert import exponential, gelu, layer_norm, softmax, tanh
from megatron_bert.ibert.fixed_point import LARGEST_ACCUMULATOR, Dyadic, requantise
from tests.megatron_bert.ibert.intervals import Interval, watched

#: Any dyadic number of the package.
ANY = Dyadic(Interval(0, 2**23), Interval(1, 52))


def test_requantisation_has_53_bits():
    with watched():
        result = requantise(Interval(-LARGEST_ACCUMULATOR, LARGEST_ACCUMULATOR), ANY, -127, 127)
    assert (result.low, result.high) == (-127, 127)
    # float64 holds all integers of 53 bits, so it carries the same sum.
    assert Interval.widest == 53


def test_exponential_has_25_bits():
    with watched():
        result = exponential.exponential(Interval(0, exponential.LARGEST_ARGUMENT))
    assert Interval.widest <= 26
    assert result.low >= 0
    assert result.high == exponential.ONE


def test_gelu_has_31_bits():
    with watched():
        gelu.gelu(Interval(-gelu.LARGEST_ARGUMENT, gelu.LARGEST_ARGUMENT))
    assert Interval.widest <= 31


def test_tanh_has_30_bits():
    with watched():
        result = tanh.tanh(Interval(-tanh.LARGEST_ARGUMENT, tanh.LARGEST_ARGUMENT))
    assert Interval.widest <= 31
    assert (result.low, result.high) == (-tanh.LARGEST, tanh.LARGEST)


def test_softmax_holds_32_bits_outside_of_requantisation(monkeypatch):
    scores = Interval(-(2**24) + 1, 2**24 - 1)
    whole = softmax.requantise
    widths = []

    def requantised(*args):
        before = Interval.widest
        result = whole(*args)
        widths.append(Interval.widest)
        Interval.widest = before
        return result

    monkeypatch.setattr(softmax, "requantise", requantised)
    with watched():
        result = softmax.softmax_numerators(scores, ANY, None)
    assert Interval.widest <= 31
    assert widths[0] <= 53
    assert (result.low, result.high) == (0, 255)


def test_weighted_mean_has_53_bits():
    sums = 255 * softmax.MOST_KEYS
    assert sums < 2**22
    inverse = Dyadic(Interval(2**22, 2**23), Interval(23 - softmax.MEAN_BITS, 44 - softmax.MEAN_BITS))
    with watched():
        softmax.weighted_mean(Interval(-127 * sums, 127 * sums), inverse)
    assert Interval.widest <= 53


@pytest.mark.parametrize(("columns", "bits"), [(1024, 16), (2560, 16), (8192, 16), (2048, 18)])
def test_layer_norm_holds_64_bits(columns, bits, monkeypatch):
    monkeypatch.setattr(layer_norm, "square_root", lambda n: Interval(0, isqrt(n.high)))
    limit = 2 ** (bits - 1) - 1
    assert columns * limit < 2**28
    with watched():
        total, squares = layer_norm.moments(Interval(-limit, limit, columns))
        deviation = layer_norm.deviation(total, squares, columns, Interval(0, 2**60))
    assert Interval.widest <= 62
    assert deviation.high < 2**31
    inverse = Dyadic(Interval(2**22, 2**23), Interval(23, 53))
    with watched():
        normal = layer_norm.normalised(Interval(-limit, limit), total, inverse, columns)
    assert Interval.widest <= 53
    parameters = layer_norm.Affine(Interval(-(2**24), 2**24), Interval(-(2**30), 2**30), 20)
    with watched():
        layer_norm.scaled(normal, parameters)
    assert Interval.widest <= 43
