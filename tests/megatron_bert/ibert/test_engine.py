# SPDX-License-Identifier: Apache-2.0
"""Engines give the bits of the simulation: the reference in torch's integers, from a plan."""

from __future__ import annotations

import pytest
import torch

from megatron_bert.ibert import QuantizationConfig, named_ranges
from megatron_bert.ibert.engine import reference
from megatron_bert.ibert.engine.compile import Parts, compile_plan
from megatron_bert.ibert.engine.plan import Plan
from megatron_bert.ibert.engine.reference import ReferenceBackend
from megatron_bert.model.configuration import MegatronBertConfig
from parallel.errors import UserError
from tests.megatron_bert.ibert.support import SIZES, Stack, packed, quantized_stack, sequences


def _plan(stack: Stack, placement: str, layers: int) -> Plan:
    config = MegatronBertConfig(**SIZES, num_hidden_layers=layers, layer_norm_placement=placement)
    encoder = stack.encoder
    return compile_plan(Parts(config, "encoder", stack.embeddings, encoder.layer_list(), encoder.final_norm))


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize(
    ("narrow", "settings"),
    [(1.0, {}), (0.2, {}), (30.0, {"residual_bits": 12}), (1.0, {"weight_bits": 7, "attention_bits": 7})],
)
def test_the_reference_gives_the_bits_of_the_simulation(placement, narrow, settings):
    """``narrow`` ranges make every clamp count; wide ones leave factors no guard bits."""
    stack = quantized_stack(placement, 3, QuantizationConfig(**settings))
    for value in named_ranges(stack).values():
        value.mul_(narrow)
    if placement == "pre":  # read at another scale than it was written at
        named_ranges(stack)["encoder.layers.1.ranges.input.range"].mul_(4)
    ids, longest = sequences(40, 25, 1)
    tokens, positions, layout = packed(ids, longest)
    with torch.no_grad():
        expected = stack(tokens, positions, layout)
    plan = _plan(stack, placement, 3)
    starts = torch.tensor([0, 40, 65, 66], dtype=torch.int32)
    found = ReferenceBackend().prepare(plan).encode(tokens.int(), positions.int(), torch.zeros(66).int(), starts)
    assert found.dtype == torch.int16
    assert torch.equal(plan.hidden_values(found), expected)


@pytest.mark.parametrize(("tokens", "columns", "rows"), [(1, 1, 3), (5, 1, 2), (1, 2, 1), (3, 7, 1), (2, 64, 5)])
def test_products_of_any_size_are_exact(tokens, columns, rows):
    x, weight = (torch.randint(-127, 128, (n, columns)) for n in (tokens, rows))
    found = reference.product(x.to(torch.int8), weight.to(torch.int8))
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), (x[:, None] * weight).sum(2))


def test_what_no_engine_runs_is_refused():
    stack = quantized_stack("pre", 1, QuantizationConfig(force_dequant="gelu"))
    with pytest.raises(UserError, match="computes gelu in floating point"):
        _plan(stack, "pre", 1)
    stack = quantized_stack("pre", 1)
    named_ranges(stack)["encoder.layers.0.ranges.query.range"].fill_(-1)
    with pytest.raises(UserError, match="before its ranges were calibrated"):
        _plan(stack, "pre", 1)
