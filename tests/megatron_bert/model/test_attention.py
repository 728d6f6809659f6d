# SPDX-License-Identifier: Apache-2.0
"""Attention written out, fused, and by a float64 formula; dropout of its probabilities."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_bert.family.attention import Attention
from megatron_bert.model import attention
from megatron_bert.model.attention import SelfAttention
from megatron_bert.model.attention_functions import explicit_attention, fused_attention
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.sequences import SequenceLayout
from parallel.dropout import fold_in, keep_mask
from parallel.mesh import SINGLE

B, A, S, D = 3, 2, 9, 8
LENGTHS = torch.tensor([9, 4, 1])
MASKS = {"all": None, "padded": torch.arange(S) < LENGTHS[:, None]}
#: float32 sums of 8 and 9 terms within a few instances: some tens of roundings of 1.2e-7.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def _inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(B, A, S, D).to(dtype).requires_grad_() for _ in range(3)]


def _formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kept: Tensor | None = None) -> Tensor:
    scores = torch.einsum("baqd,bakd->baqk", query, key) / math.sqrt(D)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
    weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    if kept is not None:
        weights = weights * kept / 0.75
    return torch.einsum("baqk,bakd->baqd", weights, value)


def _assert_like_the_formula(
    out: Tensor, inputs: list[Tensor], mask: Tensor | None, kept: Tensor | None = None
) -> None:
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = _formula(*exact, mask, kept)
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    gradient = torch.randn(B, A, S, D)
    out.backward(gradient)
    expected.backward(gradient.double())
    for x, e in zip(inputs, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), e.grad, **CLOSE)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("function", [explicit_attention, fused_attention])
def test_formula(function, mask):
    inputs = _inputs()
    _assert_like_the_formula(function(*inputs, MASKS[mask]), inputs, MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
def test_dropout_of_probabilities(mask):
    inputs = _inputs()
    keys = fold_in(torch.arange(B * A * S).view(B, A, S), 1)
    kept = keep_mask(keys, S, 0.25)
    out = explicit_attention(*inputs, MASKS[mask], 0.25, keys)
    _assert_like_the_formula(out, inputs, MASKS[mask], kept)


def test_keyed_dropout_needs_keys():
    with pytest.raises(AssertionError, match="needs keys"):
        explicit_attention(*_inputs(), None, 0.1)


@pytest.mark.parametrize("function", [explicit_attention, fused_attention])
def test_masked_keys_have_no_influence(function):
    query, key, value = (x.detach() for x in _inputs())
    mask = MASKS["padded"]
    before = function(query, key, value, mask)
    hidden = ~mask[:, None, :, None]
    after = function(query, key.masked_fill(hidden, 1e4), value.masked_fill(hidden, -1e4), mask)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("function", [explicit_attention, fused_attention])
def test_bfloat16(function):
    inputs = [x.detach() for x in _inputs(torch.bfloat16)]
    out = function(*inputs, MASKS["padded"])
    assert out.dtype == torch.bfloat16
    expected = _formula(*(x.double() for x in inputs), MASKS["padded"])
    # Values within about 4: probabilities, their products with values and the result are each rounded to 8 bits.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4 * 4 * torch.finfo(torch.bfloat16).eps)


def test_a_sequence_without_keys_stays_finite_in_the_reference():
    mask = torch.zeros(B, S, dtype=torch.bool)
    query, key, value = (x.detach() for x in _inputs())
    out = explicit_attention(query, key, value, mask)
    torch.testing.assert_close(out, value.mean(dim=2, keepdim=True).expand_as(out), **CLOSE)


@pytest.mark.parametrize("position", ["absolute", "relative_key_query"])
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("keyed", [False, True])
def test_packed_sequences_in_parts_equal_a_filled_rectangle(monkeypatch, position, recompute, keyed):
    config = MegatronBertConfig(
        hidden_size=A * D, num_attention_heads=A, max_position_embeddings=S, position_embedding_type=position
    )
    module = SelfAttention(config) if position == "absolute" else Attention(config, SINGLE)
    module.recompute = recompute
    parameters = [parameter for name, parameter in module.named_parameters() if not name.startswith("ln.")]
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.2)
    layout = SequenceLayout.packed(LENGTHS, S)
    tokens = int(LENGTHS.sum())
    keys = fold_in(torch.arange(tokens), 5) if keyed else None
    hidden, gradient = torch.randn(tokens, A * D, requires_grad=True), torch.randn(tokens, A * D)
    found = []
    for limit, parts in ((1 << 30, 1), (0, len(set(LENGTHS.tolist()))), (-1, len(LENGTHS))):
        monkeypatch.setattr(attention, "SCORES_PER_SEQUENCE", limit)
        with patch.object(module, "_attend_within", wraps=module._attend_within) as within:
            out = module(hidden, layout, keys)
        assert within.call_count == parts
        found.append([out, *torch.autograd.grad(out, [hidden, *parameters], gradient)])
    for one, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(other, one, **CLOSE)


@pytest.mark.parametrize("fused", [True, False])
def test_bfloat16_is_trained_written_out_on_a_processor(monkeypatch, fused):
    """Both ways against float64, with rounding to 8 bits of inputs, scores, probabilities and results."""
    module = SelfAttention(MegatronBertConfig(hidden_size=A * D, num_attention_heads=A, max_position_embeddings=S))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    module.to(torch.bfloat16).train()
    if fused:
        monkeypatch.setattr(attention, "WRITTEN_OUT_KEYS", 0)
    layout = SequenceLayout.packed(LENGTHS, S)
    hidden = torch.randn(int(LENGTHS.sum()), A * D).to(torch.bfloat16).requires_grad_()
    gradient = torch.randn(int(LENGTHS.sum()), A * D).to(torch.bfloat16)
    with patch.object(module, "_write_out", wraps=module._write_out) as written:
        out = module(hidden, layout, None)
    assert written.called is not fused
    found = [out, *torch.autograd.grad(out, [hidden, *module.parameters()], gradient)]
    module.double()
    exact = hidden.detach().double().requires_grad_()
    out = module(exact, layout, None)
    for got, expected in zip(
        found, [out, *torch.autograd.grad(out, [exact, *module.parameters()], gradient.double())], strict=True
    ):
        assert (got.double() - expected).norm() <= 4 * 2**-8 * expected.norm()
