# SPDX-License-Identifier: Apache-2.0
"""The quantized encoder: integers between quantizers, whatever the batch, the padding or the length."""

from __future__ import annotations

import pytest
import torch
import transformers

from megatron_bert.ibert import QuantizationConfig, in_mode, quantizers
from megatron_bert.ibert.attention import AttentionScales, integer_attention
from megatron_bert.ibert.epilogues import Target
from megatron_bert.model.sequences import SequenceLayout
from tests.megatron_bert.ibert.support import packed, padded, quantized_stack, sequences, tensors_of

PLACEMENTS = ("pre", "post")
SIGNED = Target(-127, 127)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_tensors_between_quantizers_are_integers_in_twelve_layers(placement):
    stack = quantized_stack(placement)
    targets = {name: quantizer.target() for name, quantizer in quantizers(stack)}
    skipped = {"input"}  # what a norm reads is the tensor of the quantizer before
    expected = {name for name in targets if name.split(".")[-1] not in skipped}
    assert len({name.split(".")[2] for name in expected if ".layers." in name}) == 12
    for lengths in ((1,), (2, 1), (33, 7), (512,), (512, 300, 1)):
        ids, longest = sequences(*lengths)
        for batch in (padded(ids, longest), packed(ids, longest)):
            with torch.no_grad():
                found = tensors_of(stack, lambda batch=batch: stack(*batch))
            assert found.keys() == expected
            for name, q in found.items():
                assert float((q - q.round()).abs().max()) == 0.0, (name, lengths)
                assert targets[name].low <= float(q.min()), (name, lengths)
                assert float(q.max()) <= targets[name].high, (name, lengths)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_padded_equals_packed_and_alone(placement):
    stack = quantized_stack(placement, layers=3)
    ids, longest = sequences(20, 1, 64, 7)
    with torch.no_grad():
        whole = stack(*padded(ids, longest)).unflatten(0, (len(ids), longest))
        dense = stack(*packed(ids, longest)).split([len(one) for one in ids])
        for row, one in enumerate(ids):
            alone = stack(*padded([one], len(one)))
            assert torch.equal(whole[row, : len(one)], dense[row])
            assert torch.equal(alone, dense[row])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_close_to_the_float_model(placement):
    stack = quantized_stack(placement, layers=3)
    batch = padded(*sequences(40, 25, 3))
    with torch.no_grad():
        integer = stack(*batch)
        with in_mode(stack, "float"):
            real = stack(*batch)
    noise = float((integer - real).square().sum() / real.square().sum())
    assert noise < 10**-2.4  # 24 dB; 8 bits of a Gaussian tensor alone are some 40 dB


def test_a_fully_masked_row_is_defined():
    stack = quantized_stack("pre", layers=2)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1] = False
    batch = torch.randint(0, 90, (12,)), torch.arange(6).repeat(2), SequenceLayout.rectangle(2, 6, mask)
    found = tensors_of(stack, lambda: stack(*batch).square().sum().backward())
    contexts = found["encoder.layers.0.ranges.context"].unflatten(0, (2, 6))
    assert int(contexts[1].abs().max()) == 0
    assert int(contexts[0].abs().max()) > 0
    assert all(bool(p.grad.isfinite().all()) for p in stack.parameters() if p.grad is not None)


def test_uniform_attention_over_512_keys():
    values = torch.randint(-127, 128, (1, 2, 512, 8)).float()
    query = torch.zeros(1, 2, 3, 8)
    scale = AttentionScales(0.02, 0.02, 0.03)
    key = torch.randint(-127, 128, (1, 2, 512, 8)).float()
    context, numerators, sums = integer_attention(query, key, values, None, scale, SIGNED._replace(scale=0.03 / 32))
    assert bool((numerators == 255).all())
    assert bool((sums == 512 * 255).all())
    real = values.double().mean(2, keepdim=True) * 32
    # Rounded once to 2^-16 and once to a step; the fine scale shows 32nds of a value's step.
    assert (context - real.clamp(-127, 127)).abs().max() <= 0.5 + 32 * 2.0**-16 + 1e-3
    assert context.abs().max() > 1


def test_attention_over_more_keys_than_one_product_sums():
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randint(-127, 128, (1, 1, n, 4), generator=generator).float() for n in (2, 1500, 1500))
    value[:] = 127.0
    query[:] = 0.0
    context, _, sums = integer_attention(
        query, key, value, None, AttentionScales(1e-3, 1e-3, 0.01), SIGNED._replace(scale=0.01)
    )
    assert int(sums.max()) == 1500 * 255
    assert bool((context == 127).all())


@pytest.mark.parametrize(
    ("force", "free"),
    [("gelu", "gelu"), ("softmax", "context"), ("layernorm", "mlp_input"), ("nonlinear", "mlp_input")],
)
def test_what_is_forced_is_computed_in_floating_point(force, free):
    """The forced layer's result is nearer to the float function, and only that layer changes."""
    settings = QuantizationConfig(layer_force_dequant={1: force})
    stack, plain = quantized_stack("pre", 2, settings), quantized_stack("pre", 2)
    plain.load_state_dict(stack.state_dict())
    batch = padded(*sequences(30, 9))
    with torch.no_grad():
        forced = tensors_of(stack, lambda: stack(*batch))
        whole = tensors_of(plain, lambda: plain(*batch))
    name = f"encoder.layers.1.ranges.{free}"
    for point, q in whole.items():
        if ".layers.0." in point:
            assert torch.equal(forced[point], q)
    difference = (forced[name] - whole[name]).abs()
    assert int((difference > 0).sum()) > 0
    assert int(difference.max()) <= 3  # the integer functions are that close
    assert bool((forced[name] == forced[name].round()).all())


@pytest.mark.parametrize(
    "settings", [{"weight_bits": 7}, {"activation_bits": 7}, {"attention_bits": 7}, {"residual_bits": 12}]
)
def test_widths(settings):
    config = QuantizationConfig(**settings)
    stack = quantized_stack("pre", 2, config)
    found = tensors_of(stack, lambda: stack(*padded(*sequences(30, 9))))
    stream = {"input", "middle", "output"}
    for name, q in found.items():
        kind = name.split(".")[-1]
        if kind in stream:
            limit = 2 ** (config.residual_bits - 1) - 1
        else:
            bits = config.attention_bits if kind in ("query", "key", "value") else config.activation_bits
            limit = 2**bits - 1 if kind == "gelu" else 2 ** (bits - 1) - 1
        assert limit / 8 < float(q.abs().max()) <= limit, name


def test_the_published_code_does_not_hold_integers():
    """transformers' IBert, over the scale it hands each layer: integers in the first layer, anything after it."""
    torch.manual_seed(0)
    config = transformers.IBertConfig(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        quant_mode=True,
    )
    model, ids, fractions = transformers.IBertModel(config), torch.randint(2, 90, (2, 20)), []

    def look(module, arguments):
        hidden, scale = arguments[:2]
        q = (hidden / scale).detach().double()
        fractions.append(float((q - q.round()).abs().max()))

    for layer in model.encoder.layer:
        layer.register_forward_pre_hook(look)
    model.train()
    model(ids)  # finds its ranges
    fractions.clear()
    model.eval()
    model(ids)
    assert fractions[0] < 1e-4
    assert min(fractions[1:]) > 0.4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_integer(dtype):
    """It would compute products in 8 significant bits, and say nothing."""
    stack = quantized_stack("pre", 2)
    batch = padded(*sequences(30, 9))
    with torch.no_grad():
        expected = stack(*batch)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(stack(*batch), expected)
