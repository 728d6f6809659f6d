# SPDX-License-Identifier: Apache-2.0
"""Integer functions against the real ones, and the paper's polynomials against its own table."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_bert.ibert import exponential, gelu, layer_norm, softmax, square_root, tanh
from megatron_bert.ibert.fixed_point import (
    carried_short,
    dyadic,
    factor,
    inverse_power,
    largest,
    quantize,
    requantize,
    wide_requantize,
)
from megatron_bert.model.activations import LEAST_GELU
from tests.megatron_bert.ibert import paper

# ---------------------------------------------------------------- the paper's table


@pytest.mark.parametrize(
    ("function", "root_mean_square", "largest_error"),
    # Table 1 of the paper; what it calls the L2 distance is the root mean square on [-4, 4].
    [(paper.sigmoid_gelu, 0.012, 0.020), (paper.h_gelu, 0.031, 0.068), (paper.i_gelu, 0.0082, 0.018)],
)
def test_the_papers_gelu_table(function, root_mean_square, largest_error):
    x = torch.linspace(-4, 4, 80001, dtype=torch.float64)
    error = function(x) - paper.gelu(x)
    digits = 5e-5 if root_mean_square < 0.01 else 5e-4
    assert abs(float(error.square().mean().sqrt()) - root_mean_square) <= digits
    # The paper cuts digits off: h-GELU's 0.0687 is printed as 0.068.
    assert 0.0 <= float(error.abs().max()) - largest_error < 1e-3


def test_the_papers_exponential():
    x = torch.linspace(-20, 0, 200001, dtype=torch.float64)
    errors = [float((paper.i_exp(x, repository=r) - x.exp()).abs().max()) for r in (False, True)]
    # The paper prints 1.9e-3, which its code's coefficients have; those it prints have 2.1e-3.
    assert [round(e, 5) for e in errors] == [0.00213, 0.00191]


def test_the_papers_square_root_needs_more_than_four_divisions():
    numbers = torch.randint(1, 2**31, (20000,), dtype=torch.int64).tolist()
    steps = [paper.i_sqrt_steps(n) for n in numbers]
    assert max(steps) > 4
    assert sum(count > 5 for count in steps) < len(steps) / 1000


# ---------------------------------------------------------------- what takes their place


def test_gelu_is_fifteen_times_closer_than_the_papers():
    for exponent in gelu.EXPONENTS:
        argument = torch.arange(-32767, 32768, dtype=torch.int32)
        x = argument.double() / 2**exponent
        ours = gelu.gelu(argument, exponent).double() / 2**exponent
        error = (ours - paper.gelu(x)).abs()
        assert error.max() < 1.1e-3 + 0.9 * 2.0**-exponent
        # The tanh approximation, which some models are trained with, is as near as GELU itself.
        assert (ours - torch.nn.functional.gelu(x, approximate="tanh")).abs().max() < error.max() + 5e-4
        assert ours[argument == 0] == 0
        assert ours.min() > LEAST_GELU - 2.0**-exponent
    assert error.max() * 15 < (paper.i_gelu(x) - paper.gelu(x)).abs().max()
    inside = x.abs() <= 4
    assert error[inside].square().mean().sqrt() < 7e-4


def test_the_argument_of_gelu_is_finer_than_its_result_and_reaches_beyond():
    for limit in (0.01, 0.3, 2.0, 9.0, 70.0, 4000.0):
        scale = (limit - LEAST_GELU) / 255
        step = 2.0 ** -gelu.argument_exponent(scale)
        assert step < scale / 5
        assert step * 2**14 > 2 * limit


def test_functions_give_the_same_in_32_and_64_bits():
    argument = torch.arange(-32767, 32768)
    assert torch.equal(gelu.gelu(argument, 9), gelu.gelu(argument.int(), 9).long())
    argument = torch.arange(0, exponential.LARGEST_ARGUMENT + 1)
    assert torch.equal(exponential.exponential(argument), exponential.exponential(argument.int()).long())
    argument = torch.arange(-tanh.LARGEST_ARGUMENT, tanh.LARGEST_ARGUMENT + 1)
    assert torch.equal(tanh.tanh(argument), tanh.tanh(argument.int()).long())


def test_exponential():
    t = torch.arange(0, exponential.LARGEST_ARGUMENT + 1, dtype=torch.int32)
    ours = exponential.exponential(t).double() / exponential.ONE
    real = torch.exp2(-t.double() / 2**exponential.ARGUMENT_BITS)
    assert (ours - real).abs().max() < 1.3e-4  # the paper's: 1.9e-3
    assert bool((ours.diff() <= 0).all())
    assert ours[0] == 1.0
    assert ours[-1] == 0.0


def test_tanh():
    t = torch.arange(-tanh.LARGEST_ARGUMENT, tanh.LARGEST_ARGUMENT + 1, dtype=torch.int32)
    ours = tanh.tanh(t)
    real = torch.tanh(t.double() / tanh.ARGUMENT_FACTOR)
    assert (ours.double() / 2**15 - real).abs().max() < 1.2e-4
    assert torch.equal(ours, -ours.flip(0))


def test_square_root_is_exact():
    roots = torch.randint(1, 2**31 - 1, (2000,))
    n = torch.cat([torch.arange(5000), roots * roots, roots * roots - 1, roots * roots + 1, torch.tensor([2**62])])
    n = torch.cat([n, torch.randint(0, 2**62, (5000,))])
    found = square_root.square_root(n)
    assert found.tolist() == [math.isqrt(value) for value in n.tolist()]


# ---------------------------------------------------------------- fixed point


def test_quantizer():
    x = torch.randn(1000)
    scale = torch.tensor(0.02)
    q = quantize(x, scale, 8)
    assert torch.equal(q, q.round())
    assert int(q.abs().max()) <= largest(8) == 127
    kept = q.abs() < 127
    # Half a step, and what float32's division and sum add.
    assert ((q * scale - x).abs()[kept] / scale).max() <= 0.5 * (1 + 1e-5)
    assert quantize(torch.tensor([0.5, -0.5, 1.5]), torch.tensor(1.0), 8).tolist() == [1.0, 0.0, 2.0]


def test_dyadic_numbers():
    scales = torch.exp2(torch.rand(5000, dtype=torch.float64) * 48 - 29)
    found = dyadic(scales)
    assert (found.value() / scales - 1).abs().max() <= 2.0**-23
    assert found.multiplier.min() >= 2**22
    assert found.multiplier.max() < 2**23
    assert (found.shift.min(), found.shift.max()) >= (1, 52)
    just_below = torch.tensor([1 - 2.0**-40], dtype=torch.float64)
    assert dyadic(just_below).value() == 1.0
    tiny = dyadic(torch.tensor(2.0**-40, dtype=torch.float64))
    assert (int(tiny.shift), float(tiny.value())) == (52, 2.0**-40)


def _literally(value: int, shift: int, multiplier: int) -> int:
    narrow = (value + (1 << (shift - 1))) >> shift if shift > 0 else value << -shift
    return (max(-(2**15), min(2**15 - 1, narrow)) * multiplier + 2**14) >> 15


def test_requantization_is_the_same_carried():
    a = torch.randint(-(2**29) + 1, 2**29, (20000,))
    scale = torch.exp2(torch.rand(20000, dtype=torch.float64) * 60 - 45)
    for guard in (0, 4):
        number = factor(scale, guard)
        assert number.multiplier.max() <= 2**15 - 1
        parts = zip(a.tolist(), number.shift.tolist(), number.multiplier.tolist(), strict=True)
        exact = [_literally(*each) for each in parts]
        assert requantize(a, number, -(2**15), 2**15).tolist() == exact
        steps = (inverse_power(number.shift), torch.tensor(0.5).double(), number.multiplier.double() / 2**15)
        assert carried_short(a.double(), *steps).tolist() == exact


@pytest.mark.parametrize(("guard", "result", "error"), [(4, 127, 0.6), (0, 16000, 1.51)])
def test_requantization_is_near_the_real_product(guard, result, error):
    scale = torch.exp2(torch.rand(20000, dtype=torch.float64) * 20 - 21 - guard)
    a = (torch.randint(-result, result + 1, (20000,)) / scale).round()
    kept = a.abs() < 2**29
    number = factor(scale, guard)
    assert (number.multiplier * 2.0**-15 * inverse_power(number.shift) / scale - 1).abs().max() <= 2.0 ** -(15 - guard)
    found = requantize(a.long(), number, -(2**15), 2**15)
    # Roundings, and what the multiplier's last bit makes of the largest result.
    allowed = error + result * 2.0 ** -(15 - guard)
    assert ((found - a * scale).abs() <= allowed)[kept].all()


def test_a_factor_beyond_the_result_saturates_and_never_wraps():
    """A model whose accumulators are coarser than a step of what follows."""
    number = factor(torch.tensor([1.5, 4e4, 1e12, 2.0**-70], dtype=torch.float64), 4)
    found = requantize(torch.tensor([[3], [-(2**28)], [0], [1]]), number, -127, 127)
    assert found.tolist() == [[5, 127, 127, 0], [-127, -127, -127, 0], [0, 0, 0, 0], [2, 127, 127, 0]]


def test_wide_requantization_is_the_same_carried():
    a = torch.randint(-(2**29) + 1, 2**29, (20000,))
    number = dyadic(torch.exp2(torch.rand(20000, dtype=torch.float64) * 40 - 32))
    exact = [
        max(-32767, min(32767, (value * int(m) + (1 << (int(e) - 1))) >> int(e)))
        for value, m, e in zip(a.tolist(), number.multiplier, number.shift, strict=True)
    ]
    assert wide_requantize(a, number, -32767, 32767).tolist() == exact
    assert (a.double() * number.value() + 0.5).floor().clamp(-32767, 32767).tolist() == exact
    half = dyadic(torch.tensor(0.5, dtype=torch.float64))
    assert wide_requantize(torch.tensor([-3, -2, -1, 0, 1, 2, 3]), half, -9, 9).tolist() == [-1, -1, 0, 0, 1, 1, 2]
    assert dyadic(torch.tensor(2.0**30, dtype=torch.float64)).shift == 1


# ---------------------------------------------------------------- rows


def _argument(step: float) -> softmax.ScoreFactor:
    return softmax.score_factor(step * math.log2(math.e) * 2**softmax.ARGUMENT_BITS)


def test_softmax_numerators():
    scores = torch.randint(-4000, 4000, (50, 77))
    step = 0.002
    mask = torch.rand(50, 77) > 0.3
    mask[0] = False
    ours = softmax.softmax_numerators(scores, _argument(step), mask)
    real = torch.where(mask, scores.double() * step, -torch.inf)
    real = (real - real.amax(-1, keepdim=True)).exp().nan_to_num() * 255
    # Half a step of rounding, up to two steps of 2^-11 of the argument, and the exponential's error.
    assert (ours - real).abs().max() < 0.5 + 255 * (2 * math.log(2) / 2**11 + 1e-4)
    assert bool((ours[~mask] == 0).all())
    assert ours[1:].amax(-1).tolist() == [255] * 49
    assert int(ours[0].sum()) == 0


def test_numerators_fall_with_distance():
    distance = torch.arange(0, 30000)
    ours = softmax.softmax_numerators(-distance[None], _argument(0.0003), None)[0]
    assert (ours[0], ours[-1]) == (255, 0)
    assert bool((ours.diff() <= 0).all())
    assert set(ours.tolist()) == set(range(256))


@pytest.mark.parametrize("step", [2e-9, 0.002, 5.0, 3e8])
@pytest.mark.parametrize("largest_score", [400, 2**24 - 1])
def test_carried_softmax_numerators_are_the_same(step, largest_score):
    """For scores whose difference has a bit more than float32 holds too, and factors of 0 and of weights gone wild."""
    scores = torch.randint(-largest_score, largest_score + 1, (40, 77))
    scores[1, :2] = torch.tensor([-largest_score, largest_score])
    mask = torch.rand(40, 77) > 0.3
    mask[0] = False
    mask[1, :2] = True
    for keep in (None, mask):
        found = softmax.carried_numerators(scores.float(), _argument(step), None if keep is None else keep.float())
        assert found.dtype == torch.float32
        assert torch.equal(found.long(), softmax.softmax_numerators(scores, _argument(step), keep))
    if step > 1:
        ours = softmax.softmax_numerators(scores, _argument(step), None)
        largest_of_row = scores == scores.amax(-1, keepdim=True)
        assert bool((ours == largest_of_row * 255).all()) or step < 1e3


def test_carried_layer_norm_is_the_same():
    x = torch.randint(-(2**15) + 1, 2**15, (30, 96))
    x[:10] = torch.randint(-1, 2, (10, 96))
    x[3] = 5
    parameters = layer_norm.affine(torch.randn(96), torch.randn(96), torch.tensor(0.05, dtype=torch.float64))
    total, squares = layer_norm.moments(x)
    for whole, carried in zip((total, squares), layer_norm.moments(x.double()), strict=True):
        assert torch.equal(whole, carried.long())
    number = layer_norm.row_factor(layer_norm.deviation(total, squares, 96, torch.tensor(1)), 96)
    assert int(number.shift.min()) < 0 < int(number.shift.max())
    normal = layer_norm.normalized(x, total, number, 96)
    assert torch.equal(normal, layer_norm.carried_normalized(x.double(), total.double(), number, 96).long())
    assert torch.equal(layer_norm.scaled(normal, parameters), layer_norm.scaled(normal.double(), parameters).long())


def test_numerators_of_a_diverged_model_are_no_error():
    """The loss says so."""
    scores = torch.tensor([[0.0, torch.nan, 3.0]])
    assert softmax.carried_numerators(scores, _argument(0.1), None).shape == (1, 3)


def test_uniform_attention_over_512_keys_keeps_its_mass():
    numerators = softmax.softmax_numerators(torch.zeros(1, 512, dtype=torch.int64), _argument(0.1), None)
    sums = numerators.sum(-1, keepdim=True)
    values = torch.randint(-127, 128, (512, 16))
    steps = 8.0  # the mean of many values has a smaller range than they have
    number = softmax.row_factor(sums, softmax.mean_factor(steps))
    mean = requantize(numerators.long() @ values, number, -127, 127)
    real = values.double().mean(0) * steps
    assert (mean - real).abs().max() < 0.5 + 1 / 16 + 127 * 2.0**-9
    # Probabilities of 8 bits, as the paper has them: 1/512 of 256 steps rounds down to nothing.
    assert int(torch.tensor(256 / 512).floor()) == 0


@pytest.mark.parametrize("ratio", [0.01, 0.9, 1.0, 3.0, 40.0])
def test_weighted_means(ratio):
    sums = torch.cat([torch.tensor([255, 256, 2**22 - 1]), torch.randint(255, 2**22, (2000,))])[:, None]
    means = torch.rand(len(sums), 1, dtype=torch.float64) * 2 - 1
    products = (sums * means * min(127.0, 127.0 / ratio)).round().long()
    number = softmax.row_factor(sums, softmax.mean_factor(ratio))
    assert number.multiplier.max() < 2**11
    real = products / sums * ratio
    assert (requantize(products, number, -127, 127) - real).abs().max() < 0.5 + 1 / 16 + real.abs().max() * 2.0**-9
    step, multiplier = softmax.row_steps(number)
    found = carried_short(products.double(), step, torch.tensor(0.5).double(), multiplier)
    assert torch.equal(found.clamp(-127, 127).long(), requantize(products, number, -127, 127))


def test_a_row_that_attends_to_nothing_is_zero():
    number = softmax.row_factor(torch.zeros(1, 1, dtype=torch.int64), softmax.mean_factor(1.3))
    assert requantize(torch.zeros(1, 4, dtype=torch.int64), number, -127, 127).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize(("columns", "step"), [(32, 0.05), (1024, 0.1), (1024, 2**-9), (2560, 2**-8)])
def test_layer_norm(columns, step):
    x = (torch.randn(40, columns) * 300 + 40).round().long()
    x[:, 3] *= 20  # an outlier channel
    weight, bias = torch.randn(columns) * 0.3 + 1, torch.randn(columns) * 0.2
    eps, unit = 1e-5, 2.0**-10
    parameters = layer_norm.affine(weight, bias, torch.tensor(step, dtype=torch.float64))
    epsilon = torch.tensor(int(eps * columns**2 / unit**2 + 0.5))
    ours = layer_norm.layer_norm(x, epsilon, parameters, 2**20)
    real = x.double() * unit
    normal = (real - real.mean(1, keepdim=True)) / (real.var(1, unbiased=False, keepdim=True) + eps).sqrt()
    error = (ours - (normal * weight.double() + bias.double()) / step).abs()
    # Half a step; of a normalized element a step or so, and the multiplier's; the rounded gain.
    last = 2.0 ** -layer_norm.normal_bits(columns)
    bound = (
        0.51 + (weight.abs() / step) * (last + normal.abs() * 2.0**-14) + normal.abs() * 2.0**-13 * weight.max() / step
    )
    assert bool((error <= bound).all())
    assert layer_norm.normal_bits(1024) == 9


@pytest.mark.parametrize("columns", [1, 2, 3, 64, 65, 1024, 1025, 8192])
def test_no_element_of_a_row_is_too_large_for_16_bits(columns):
    x = torch.zeros(1, columns, dtype=torch.int64)
    x[0, 0] = 2**15 - 1
    total, squares = layer_norm.moments(x)
    number = layer_norm.row_factor(layer_norm.deviation(total, squares, columns, torch.tensor(0)), columns)
    found = float(layer_norm.normalized(x, total, number, columns)[0, 0]) / 2.0 ** layer_norm.normal_bits(columns)
    assert found == pytest.approx((columns - 1) ** 0.5, rel=1e-3, abs=1e-9)


def test_layer_norm_of_equal_elements_is_the_bias():
    bias = torch.tensor([0.5, -1.0, 0.25, 3.0])
    parameters = layer_norm.affine(torch.ones(4), bias, torch.tensor(0.25, dtype=torch.float64))
    rows = torch.tensor([[7, 7, 7, 7], [-32767] * 4, [0, 0, 0, 0]])
    for epsilon in (0, 16):
        assert layer_norm.layer_norm(rows, torch.tensor(epsilon), parameters, 127).tolist() == [[2, -4, 1, 12]] * 3
