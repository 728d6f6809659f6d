# SPDX-License-Identifier: Apache-2.0
"""The numeric examples of transformers' tests of I-BERT, on this arithmetic.

They hold there within 0.5; here within a tenth of that or less. The exception is the linear layer, whose error is that
of weights of 8 bits: half a step times the sum of magnitudes of the input. It is compared with that bound, and exactly
with the product of the rounded weights.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bert.ibert import QuantizationConfig, Quantizer, update_ranges
from megatron_bert.ibert import gelu as integer_gelu
from megatron_bert.ibert import layer_norm as integer_norm
from megatron_bert.ibert.activations import INTEGER_ACTIVATIONS
from megatron_bert.ibert.attention import AttentionScales, integer_attention
from megatron_bert.ibert.epilogues import Target, activation_requantized, quantized, rescale
from megatron_bert.ibert.fixed_point import factor
from megatron_bert.ibert.heads import QuantizedDense
from megatron_bert.ibert.products import exact_product, quantize_weight
from megatron_bert.ibert.softmax import score_factor, softmax_numerators
from megatron_bert.ibert.stream import added_to_stream, normalized_stream
from megatron_bert.model.heads import Dense

TIGHT = 0.05
X = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [5.0, 6.0, 7.0, 8.0]])


def _whole(tensor: Tensor) -> bool:
    return tensor.eq(tensor.round()).all()


def test_embeddings():
    """Tables have the 16 bits of the stream: their error is below a fortieth of a step of theirs, which has 8."""
    quantizer = Quantizer("stream", QuantizationConfig())
    quantizer.range.fill_(float(X.abs().max()))
    rows = quantized(X, quantizer.target())
    assert _whole(rows / quantizer.scale())
    torch.testing.assert_close(rows, X, rtol=0, atol=8 / 127 / 40)


def test_ranges_of_activations():
    """The first batch gives the range, later ones move it by a twentieth, and evaluation leaves it."""
    quantizer = Quantizer("signed", QuantizationConfig())

    def used(x: Tensor) -> Tensor:
        q = quantized(x, quantizer.target())
        assert _whole(q)
        return q * quantizer.scale()

    quantizer.observe(X)
    quantizer.follow()
    assert float(quantizer.range) == 8.0
    assert quantizer.scale() == pytest.approx(8 / 127, abs=1e-9)
    # Half a step, where theirs is allowed a whole one.
    torch.testing.assert_close(used(X), X, rtol=0, atol=0.5001 * 8 / 127)
    used(2 * X)
    quantizer.follow()
    assert float(quantizer.range) == pytest.approx(0.95 * 8 + 0.05 * 16, abs=1e-6)
    limit = float(quantizer.range)
    torch.testing.assert_close(used(2 * X), (2 * X).clamp(-limit, limit), rtol=0, atol=0.5001 * limit / 127)
    quantizer.follow()
    limit = float(quantizer.range)
    quantizer.eval()
    used(3 * X)
    quantizer.follow()
    assert float(quantizer.range) == limit


def test_sum_with_an_identity():
    """Theirs is allowed 0.1; the stream's 16 bits give a thousandth."""
    identity = torch.tensor([[6.0, -7.0, 1.0, -2.0], [3.0, -4.0, -8.0, 5.0]])
    quantizer = Quantizer("stream", QuantizationConfig())
    quantizer.range.fill_(float((X + identity).abs().max()))
    target = quantizer.target()
    one = torch.ones((), dtype=torch.float64)
    z = added_to_stream(identity, X, None, rescale(factor(one / target.unit), None, one), target)
    torch.testing.assert_close(z, X + identity, rtol=0, atol=1e-3)
    assert _whole(z / target.unit)


def test_linear():
    weight = torch.tensor([[-1.0, 2.0, 3.0, -4.0], [5.0, -6.0, -7.0, 8.0]]).T.contiguous()
    x = torch.tensor([[2.0, -5.0], [-3.0, 4.0]])
    integers = quantize_weight(weight, 8)
    torch.testing.assert_close(integers.scale, weight.abs().amax(1) / 127, rtol=1e-6, atol=0)
    assert integers.q.abs().amax(1).eq(127).all()  # the largest weight is not clipped, as it is there
    sums = exact_product(x, integers.q, 127)
    assert _whole(sums)
    found = sums * integers.scale
    torch.testing.assert_close(found, x @ (integers.q * integers.scale[:, None]).T, rtol=1e-6, atol=0)
    bound = 0.5001 * integers.scale * x.abs().sum(1, keepdim=True)
    error = (found - x @ weight.T).abs()
    assert (error <= bound).all()
    assert float(error.max()) < 0.1


def test_gelu():
    x = torch.arange(-10000, 10001) * 0.001
    scale = torch.full((), 0.001, dtype=torch.float64)
    unit = 2.0**-10  # 16 bits, so that what is seen is the function's error
    accumulators = torch.arange(-10000, 10001).float()[:, None]
    target, activation = Target(-(2**15), 2**15, unit, real=True), INTEGER_ACTIVATIONS["gelu"]
    found = activation_requantized(accumulators, None, scale.expand(1), target, activation)[:, 0]
    assert _whole(found / unit)
    # The argument is rounded to 2^-10, which GELU's slope of at most 1.13 makes 1.1e-3; the polynomial adds 2e-3.
    torch.testing.assert_close(found, F.gelu(x), rtol=0, atol=3e-3)
    assert integer_gelu.argument_exponent(unit, of_stream=True) == 10


@pytest.mark.parametrize(
    "scores",
    [
        [[i + j for j in range(10)] for i in range(-10, 10)],
        [[i + j for j in range(50)] for i in range(-10, 10)],
        [[i + 100 * j for j in range(2)] for i in range(-10, 10)],
    ],
    ids=["ten", "fifty", "far-apart"],
)
def test_softmax(scores):
    x = torch.tensor(scores, dtype=torch.float32)
    numerators = softmax_numerators(x.long(), score_factor(0.1 * 1.4426950408889634 * 2**11), None)
    assert 0 <= int(numerators.min()) <= int(numerators.max()) == 255
    found = numerators / numerators.sum(-1, keepdim=True)
    torch.testing.assert_close(found, (x * 0.1).softmax(-1), rtol=0, atol=5e-3)
    torch.testing.assert_close(found.sum(-1), torch.ones(len(scores)))  # no mass is lost


def test_softmax_in_attention():
    """The same, through the mean of values that are ones in turn: the probabilities themselves, in 127ths."""
    scores = torch.tensor([[i + j for j in range(10)] for i in range(-10, 10)], dtype=torch.float32)
    keys, dim = 10, 16
    query = torch.zeros(1, 1, 20, dim)
    query[0, 0, :, :2] = torch.stack((torch.ones(20), scores[:, 0]), dim=1)
    key = torch.zeros(1, 1, keys, dim)
    key[0, 0, :, :2] = torch.stack((torch.arange(10.0), torch.ones(10)), dim=1)
    value = torch.zeros(1, 1, keys, dim)
    value[0, 0, :, :keys] = torch.eye(keys) * 127
    scales = AttentionScales(query=0.4, key=1.0, value=1 / 127)  # 0.4 / sqrt(16) = 0.1
    context, _, _ = integer_attention(query, key, value, None, scales, Target(-127, 127, 1 / 127))
    assert _whole(context)
    found = context[0, 0, :, :keys] / 127
    torch.testing.assert_close(found, (scores * 0.1).softmax(-1), rtol=0, atol=5e-3 + 0.5 / 127)


def test_layer_norm():
    rows = torch.tensor([[i * j * j + j for j in range(5, 15)] for i in range(-10, 10)], dtype=torch.float32)
    norm = nn.LayerNorm(10, eps=1e-5)
    nn.init.ones_(norm.bias)
    expected, unit = norm(rows * 0.1).detach(), 2.0**-10
    # On the integers that the example has. The least row has a deviation of 29 steps times columns, whose root is
    # rounded down: a thirtieth. Normalized elements have 12 fraction bits.
    scale = torch.tensor(unit, dtype=torch.float64)
    parameters = integer_norm.affine(norm.weight.detach(), norm.bias.detach(), scale)
    steps = integer_norm.layer_norm(rows.long(), torch.zeros((), dtype=torch.int64), parameters, 32767)
    torch.testing.assert_close(steps * unit, expected, rtol=0, atol=TIGHT)
    # On the stream, which has 16 bits.
    quantizer = Quantizer("stream", QuantizationConfig())
    quantizer.range.fill_(float((rows * 0.1).abs().max()))
    source, result = quantizer.target(), Target(-32767, 32767, unit, real=True)
    x = quantized(rows * 0.1, source)
    found = normalized_stream(x, norm.weight, norm.bias, 1e-5, source, result).detach()
    assert _whole(found / unit)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


def test_a_quantized_dense_layer_of_integers():
    """A whole module, for integer inputs as in the linear example, calibrated on them."""
    dense = Dense(2, 4, init_std=0.02)
    with torch.no_grad():
        dense.weight.copy_(torch.tensor([[-1.0, 2.0, 3.0, -4.0], [5.0, -6.0, -7.0, 8.0]]).T)
        dense.bias.zero_()
    x = torch.tensor([[2.0, -5.0], [-3.0, 4.0]])
    expected = dense(x).detach()
    dense.__class__ = QuantizedDense
    dense.quantize(QuantizationConfig())
    dense.mode = "observe"
    dense(x)
    update_ranges(dense)
    dense.mode = "integer"
    found = dense.eval()(x)
    assert _whole(found.detach() * 2**12)
    # Half a step of the input times the weights, and half a step of the weights times the input.
    bound = 0.5 * 5 / 127 * dense.weight.detach().abs().sum(1) + 0.5 * 8 / 127 * x.abs().sum(1, keepdim=True)
    assert ((found - expected).abs() <= bound).all()
