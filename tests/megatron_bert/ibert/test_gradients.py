# SPDX-License-Identifier: Apache-2.0
"""Straight-through gradients: those of the real function at the rounded argument, where nothing was clamped."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from megatron_bert.ibert import QuantizationConfig, calibrate, freeze_ranges, in_mode, named_ranges, quantize_model
from megatron_bert.ibert import gelu as integer_gelu
from megatron_bert.ibert.activations import INTEGER_ACTIVATIONS
from megatron_bert.ibert.attention import AttentionScales, integer_attention
from megatron_bert.ibert.epilogues import (
    Target,
    activation_requantized,
    dequantized,
    quantized,
    requantized,
    rescale,
    tanh_requantized,
)
from megatron_bert.ibert.fixed_point import factor
from megatron_bert.ibert.products import (
    EXACT,
    exact_attended,
    exact_product,
    integer_product,
    parts_needed,
    quantize_weight,
)
from megatron_bert.ibert.stream import added_to_stream, normalized_stream
from megatron_bert.model.activations import GELU_APPROXIMATIONS
from megatron_bert.model.attention_functions import explicit_attention
from parallel.weight_gradients import WeightGradientQueue, deferring
from tests.megatron_bert.model.support import make_batch, make_model, step, total_loss

SIGNED = Target(-127, 127)


def _double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _accumulators(rows: int, columns: int, largest: int = 20000) -> torch.Tensor:
    return torch.randint(-largest, largest, (rows, columns)).float().requires_grad_()


def test_products_are_exact_however_large():
    for width, input_size in ((1000, 127), (4096, 255), (10240, 255)):
        x = torch.randint(-input_size, input_size + 1, (5, width)).float()
        weight = torch.randint(-127, 128, (7, width)).float()
        exact = (x.long() @ weight.long().t()).double()
        assert torch.equal(exact_product(x, weight, input_size).double(), exact)
    heaviest_x, heaviest = torch.full((1, 10240), 255.0), torch.full((1, 10240), 127.0)
    assert int(exact_product(heaviest_x, heaviest, 255)) == 10240 * 255 * 127 > EXACT
    assert parts_needed(heaviest, 255) == 32
    assert parts_needed(torch.ones(3, 10240), 255) == 1
    numerators, values = torch.full((1, 2, 1100), 255.0), torch.full((1, 1100, 3), 127.0)
    assert exact_attended(numerators, values).flatten().tolist() == [1100.0 * 255 * 127] * 6


def test_weights_of_a_row_keep_their_relations():
    weight = torch.randn(9, 40) * torch.logspace(-4, 1, 9)[:, None]
    for bits, limit in ((8, 127), (7, 63)):
        q, scale = quantize_weight(weight, bits)
        assert q.abs().amax(1).tolist() == [limit] * 9
        assert ((q * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
    q, scale = quantize_weight(torch.zeros(2, 3), 8)
    assert int(q.abs().max()) == 0
    assert float(scale.min()) > 0


def test_gradient_of_a_product():
    x = torch.randint(-127, 128, (6, 10)).float().requires_grad_()
    weight = torch.randn(4, 10, requires_grad=True)
    integers = quantize_weight(weight, 8)
    sums = integer_product(x, weight, integers, input_scale=0.05, largest_input=127)
    gradient = torch.randn(6, 4)
    sums.backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ (integers.q * integers.scale[:, None]))
    torch.testing.assert_close(weight.grad, gradient.t() @ (x.detach() * 0.05))


def test_gradient_of_a_requantization_is_masked_where_it_clamps():
    a, bias = _accumulators(50, 8), torch.randn(8, requires_grad=True)
    scale = torch.full((8,), 1e-4, dtype=torch.float64)
    prepared = rescale(factor(scale / 0.01, 4), bias.detach(), scale)
    q = requantized(a, bias, prepared, SIGNED)
    gradient = torch.randn(50, 8)
    q.backward(gradient)
    exact = (a.detach().double() + (bias.detach().double() / 1e-4 + 0.5).floor()) * 0.01
    inside = exact.abs() < 127.5
    sure = (exact.abs() - 127.5).abs() > 0.2  # beside what the multiplier's last bit decides
    assert 0 < int((~inside).sum()) < inside.numel()
    assert torch.equal(a.grad[sure], (gradient * inside)[sure])
    torch.testing.assert_close(bias.grad, a.grad.sum(0))


@pytest.mark.parametrize("rows", [1, 2], ids=["computed", "looked up"])
def test_gelu_of_all_arguments(rows):
    """Looked up where there are many, computed where there are few; clamped at both ends of the argument."""
    a = torch.arange(-40000, 40000, 3 - rows)
    result_scale, target = 0.25, Target(-1, 200, 0.25)
    exponent = integer_gelu.argument_exponent(result_scale)
    assert exponent == 7
    steps = integer_gelu.gelu(a.clamp(-32767, 32767), exponent)
    expected = ((steps * 2**10 + 2**14) >> 15).clamp(target.low, target.high)
    scale = _double(2.0**-exponent * (1 - 2.0**-15))  # for a multiplier of 32767
    given = a.float()[:, None].repeat(1, rows)
    assert (given.numel() > 2 * 32767) == (rows == 2)
    for column in activation_requantized(given, None, scale, target, INTEGER_ACTIVATIONS["gelu"]).unbind(1):
        assert int((column.long() - expected).abs().max()) <= 1
        assert (column.long() != expected).float().mean() < 0.02
    given[5] = torch.nan  # of a model that diverges: no error, the loss says so
    activation_requantized(given, None, scale, target, INTEGER_ACTIVATIONS["gelu"])


def test_gradient_of_gelu():
    a, bias = _accumulators(200, 8, 4000), torch.randn(8, requires_grad=True)
    scale = torch.full((8,), 1e-3, dtype=torch.float64)
    for hidden_act, approximate in GELU_APPROXIMATIONS.items():
        a.grad = bias.grad = None
        q = activation_requantized(a, bias, scale, Target(-14, 241, 0.012), INTEGER_ACTIVATIONS[hidden_act])
        gradient = torch.randn(200, 8)
        q.backward(gradient)
        x = ((a.detach() + (bias.detach() * 1000 + 0.5).floor()) * 1e-3).requires_grad_()
        y = F.gelu(x, approximate=approximate)
        inside = y.detach() < 241.5 * 0.012
        assert int((~inside).sum()) > 0
        # The integer argument is x to half a step of 2^-9; GELU's second derivative is below 1.2.
        (expected,) = torch.autograd.grad(y, x, gradient * inside)
        near = (y.detach() - 241.5 * 0.012).abs() < 0.002
        torch.testing.assert_close(
            a.grad[~near], expected[~near], rtol=0, atol=float(gradient.abs().max()) * 1.2 * 2.0**-10 + 1e-5
        )
        torch.testing.assert_close(bias.grad, a.grad.sum(0))


def test_gradient_of_tanh():
    a, bias = _accumulators(30, 8, 3000), torch.randn(8, requires_grad=True)
    scale = torch.full((8,), 1e-3, dtype=torch.float64)
    out = tanh_requantized(a, bias, scale)
    assert torch.equal(out * 2**15, (out * 2**15).round())
    out.backward(torch.ones_like(out))
    x = a.detach() * 1e-3 + bias.detach()
    torch.testing.assert_close(out.detach(), x.tanh(), rtol=0, atol=1e-3)
    torch.testing.assert_close(a.grad, 1 - x.tanh().square(), rtol=0, atol=2e-3)
    torch.testing.assert_close(bias.grad, a.grad.sum(0))


def test_gradient_of_the_residual_sum_with_dropout():
    stream = (torch.randn(40, 8) * 3).requires_grad_()
    a, bias = _accumulators(40, 8), torch.randn(8, requires_grad=True)
    scale = torch.full((8,), 2e-4, dtype=torch.float64)
    kept, unit = torch.rand(40, 8) > 0.25, 2.0**-9
    target = Target(-2047, 2047, unit, real=True)
    prepared = rescale(factor(scale / unit / 0.75), bias.detach(), scale)
    out = added_to_stream(stream, a, bias, prepared, target, kept=kept, keep_factor=1 / 0.75)
    total = stream.detach() + (a.detach() * 2e-4 + bias.detach()) * kept / 0.75
    assert torch.equal(out / unit, (out / unit).round())
    torch.testing.assert_close(out.detach(), total.clamp(-2047 * unit, 2047 * unit), rtol=0, atol=1.51 * unit)
    gradient = torch.randn(40, 8)
    out.backward(gradient)
    inside = total.abs() < 2047 * unit
    sure = (total.abs() - 2047 * unit).abs() > 2 * unit
    torch.testing.assert_close(stream.grad[sure], (gradient * inside)[sure])
    torch.testing.assert_close(a.grad[sure], (gradient * inside * kept / 0.75)[sure])
    torch.testing.assert_close(bias.grad, a.grad.sum(0))


def test_gradient_of_layer_norm():
    unit = 2.0**-10
    stream = ((torch.randn(20, 64) * 500).round() * unit).requires_grad_()
    weight, bias = (torch.randn(64) * 0.2 + 1).requires_grad_(), torch.randn(64, requires_grad=True)
    source = Target(-32767, 32767, unit, real=True)
    given = [t.detach().clone().requires_grad_() for t in (stream, weight, bias)]
    real = F.layer_norm(given[0], (64,), given[1], given[2], 1e-5)
    steps = (real.detach() / 0.02).abs()
    inside = steps < 127.5
    # None for the few elements so near the bound that rounding decides.
    gradient = torch.randn(20, 64) * ((steps - 127.5).abs() > 0.05)
    q = normalized_stream(stream, weight, bias, 1e-5, source, SIGNED._replace(scale=0.02))
    q.backward(gradient)
    assert int((~inside).sum()) > 0
    real.backward(gradient * inside)
    for one, other in zip((stream, weight, bias), given, strict=True):
        # The integer deviation is rounded down to a multiple of 1 / (64 * 500) of itself, about.
        largest = float(other.grad.abs().max())
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_of_attention(dropout):
    scales, target = AttentionScales(0.03, 0.03, 0.02), SIGNED._replace(scale=0.02)
    integers = [torch.randint(-100, 101, (2, 3, 9, 8)).float().requires_grad_() for _ in range(3)]
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    kept = torch.rand(2, 3, 9, 9) >= dropout if dropout else None
    context, _, _ = integer_attention(*integers, mask, scales, target, kept=kept, keep_factor=1 / (1 - dropout))
    gradient = torch.randn(2, 3, 9, 8)
    context.backward(gradient)
    real = [(t.detach() * s).double().requires_grad_() for t, s in zip(integers, scales[:3], strict=True)]
    scores = (real[0] @ real[1].transpose(-1, -2) / 8**0.5).masked_fill(~mask[:, None, None, :], -torch.inf)
    probabilities = scores.softmax(-1)
    if kept is not None:
        probabilities = probabilities * kept / (1 - dropout)
    else:
        plain = explicit_attention(*(t.detach() for t in real), mask)
        torch.testing.assert_close(context.detach().double() * 0.02, plain, rtol=0, atol=0.02)
    (probabilities @ real[2]).backward((gradient * (context.detach().abs() < 127)).double())
    for one, other in zip(integers, real, strict=True):
        difference = (one.grad - other.grad).norm() / other.grad.norm()
        assert float(difference) < 0.02  # numerators are rounded to 255ths


def test_quantizing_and_dequantizing_pass_gradients_through():
    x = torch.randn(30, 4, requires_grad=True)
    q = quantized(x, SIGNED._replace(scale=0.015))
    y = dequantized(q, _double(0.015))
    assert (y - x.clamp(-1.905, 1.905)).abs().max() <= 0.0076
    y.sum().backward()
    inside = (x.detach() / 0.015 + 0.5).floor().abs() <= 127
    assert torch.equal(x.grad, inside.float())


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_parameter_gets_its_gradient(placement, dropout):
    """Norm biases included, and every gradient points where the float model's does, dropout's masks the same."""
    changes = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = make_model(layer_norm_placement=placement, **changes)
    batch, seed = make_batch(), 3 if dropout else None
    quantize_model(model, QuantizationConfig())
    calibrate(model, [batch], model)
    for value in named_ranges(model).values():
        value.mul_(1.0 if dropout == 0.0 else 1.5)  # dropout enlarges what it keeps
    integer = step(model, batch, seed)
    model.zero_grad()
    with in_mode(model, "float"):
        real = step(model, batch, seed)
    for name, gradient in real.items():
        if gradient.dim() > 0:
            cosine = F.cosine_similarity(integer[name].flatten(), gradient.flatten(), dim=0)
            assert float(cosine) > 0.97, name


def test_deferred_weight_gradients_are_the_same():
    """What zero-bubble schedules do: weight gradients run after the backward pass."""
    model, batch = make_model(), make_batch()
    quantize_model(model, QuantizationConfig())
    calibrate(model, [batch], model)
    at_once = step(model, batch)
    model.zero_grad()
    queue = WeightGradientQueue()
    with deferring(queue):
        total_loss(model, batch).backward()
    weight = model.encoder.layers["1"].mlp.output.weight
    assert weight.grad is None
    queue.run()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, at_once[name]), name


def test_recomputation_changes_nothing():
    models = [make_model(recompute=mode, hidden_dropout_prob=0.1) for mode in ("none", "selective", "full")]
    batch, results = make_batch(), []
    for model in models:
        quantize_model(model, QuantizationConfig())
        calibrate(model, [batch], model)
        freeze_ranges(model)
        results.append(step(model, batch, 3))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


def test_small_steps_against_finite_differences():
    """Along the gradient the loss falls by about what the gradient says."""
    model = make_model()
    batch = make_batch()
    quantize_model(model, QuantizationConfig())
    calibrate(model, [batch], model)
    freeze_ranges(model)
    before = step(copy.deepcopy(model), batch)
    moved = copy.deepcopy(model)
    size = 0.02
    norm = torch.sqrt(sum(g.square().sum() for n, g in before.items() if n != "loss"))
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.sub_(before[name] * size / norm)
    fall = float(before["loss"] - step(moved, batch)["loss"])
    assert 0.6 * size * float(norm) < fall < 1.4 * size * float(norm)
