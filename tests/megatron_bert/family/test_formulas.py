# SPDX-License-Identifier: Apache-2.0
"""What transformers dropped or does not do, by float64 formulas: values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.megatron_bert.family.formula import Formula, weights_of
from tests.megatron_bert.family.support import BATCH, CLOSE, CONFIG, LENGTH, batch_for, build, changed, gradients

HEAD_MASK = torch.tensor([[1.0, 0.0, 0.5, 1.0], [0.0, 0.0, 1.0, 0.25]])
DECODER = {"is_decoder": True, "add_cross_attention": True}
RELATIVE = ("relative_key", "relative_key_query")


def _check(model: Any, formula: Formula, expected: Tensor, out: Any) -> None:
    torch.testing.assert_close(out.last_hidden_state.double(), expected, **CLOSE)
    for name in ("attentions", "cross_attentions"):
        if getattr(out, name) is not None:
            for ours, exact in zip(getattr(out, name), getattr(formula, name), strict=True):
                torch.testing.assert_close(ours.double(), exact, **CLOSE)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    out.last_hidden_state.backward(direction)
    expected.backward(direction.double())
    found = gradients(model)
    for name, weight in formula.weights.items():
        if name.startswith("pooler"):
            continue
        exact = torch.zeros_like(weight) if weight.grad is None else weight.grad
        largest = max(1.0, float(exact.abs().max()))
        ours = found[name].double()
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-5 * largest, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("written_out", [False, True], ids=["plain", "attentions"])
@pytest.mark.parametrize("kind", RELATIVE)
@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder"])
def test_relative_positions(kind, decoder, written_out):
    model = build("Model", changed(position_embedding_type=kind, is_decoder=decoder))
    batch = batch_for("Model")
    mask = batch["attention_mask"].bool()[:, None]
    formula = Formula(model.config, weights_of(model))
    out = model(batch["input_ids"], batch["attention_mask"], output_attentions=written_out)
    expected = formula(batch["input_ids"], mask)
    # Looking padding up gives no gradient, by definition.
    out.last_hidden_state.register_hook(lambda gradient: gradient * mask[:, 0, :, None])
    expected.register_hook(lambda gradient: gradient * mask[:, 0, :, None])
    _check(model, formula, expected, out)


def test_head_masks():
    model = build("Model")
    batch = batch_for("Model", ragged=False)
    formula = Formula(model.config, weights_of(model))
    mask = HEAD_MASK.clone().requires_grad_()
    exact = HEAD_MASK.double().requires_grad_()
    out = model(batch["input_ids"], head_mask=mask, output_attentions=True)
    _check(model, formula, formula(batch["input_ids"], head_mask=exact), out)
    torch.testing.assert_close(mask.grad.double(), exact.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "mask", [HEAD_MASK[0], HEAD_MASK[:, None, :, None, None].expand(2, BATCH, 4, 1, LENGTH)], ids=["heads", "pairs"]
)
def test_forms_of_head_masks(mask):
    model = build("Model")
    batch = batch_for("Model", ragged=False)
    rows = HEAD_MASK[:1].expand(2, -1) if mask.dim() == 1 else HEAD_MASK
    expected = Formula(model.config, weights_of(model))(batch["input_ids"], head_mask=rows.double())
    out = model(batch["input_ids"], head_mask=mask)
    torch.testing.assert_close(out.last_hidden_state.double(), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["absolute", *RELATIVE])
@pytest.mark.parametrize("length", [4, LENGTH, 14])
def test_cross_attention(length, kind):
    """The encoder may be shorter or longer than the decoder."""
    model = build("Model", changed(**DECODER, position_embedding_type=kind))
    ids = batch_for("Model", ragged=False)["input_ids"]
    encoder = torch.randn(BATCH, length, CONFIG.hidden_size)
    mask = torch.arange(length) < torch.tensor([length, 2, 3])[:, None]
    formula = Formula(model.config, weights_of(model))
    expected = formula(ids, None, HEAD_MASK.double(), encoder.double(), mask[:, None])
    out = model(
        ids,
        head_mask=HEAD_MASK,
        encoder_hidden_states=encoder,
        encoder_attention_mask=mask,
        output_attentions=True,
    )
    assert out.cross_attentions[0].shape == (BATCH, 4, LENGTH, length)
    _check(model, formula, expected, out)


def test_cross_attention_with_a_mask_of_pairs():
    model = build("Model", changed(**DECODER))
    ids = batch_for("Model", ragged=False)["input_ids"]
    encoder = torch.randn(BATCH, 5, CONFIG.hidden_size)
    mask = torch.rand(BATCH, LENGTH, 5) < 0.6
    mask[:, :, 0] = True
    expected = Formula(model.config, weights_of(model))(ids, None, None, encoder.double(), mask)
    out = model(ids, encoder_hidden_states=encoder, encoder_attention_mask=mask)
    torch.testing.assert_close(out.last_hidden_state.double(), expected, **CLOSE)


def test_pruning_equals_a_head_mask_of_zeros():
    mask = torch.ones(3, 4)
    mask[0, 1] = mask[2, 0] = mask[2, 3] = 0.0
    model, pruned = (build("ForMaskedLM", changed(num_hidden_layers=3)) for _ in range(2))
    pruned.prune_heads({0: [1], 2: [0]})
    pruned.prune_heads({2: [3, 0]})
    assert pruned.config.pruned_heads == {0: [1], 2: [0, 3]}
    assert pruned.num_parameters() < model.num_parameters()
    batch = batch_for("ForMaskedLM")
    ours, expected = pruned(**batch), model(**batch, head_mask=mask)
    torch.testing.assert_close(ours.logits, expected.logits, **CLOSE)
    # Masks and probabilities of what remains go by the old numbers.
    more = torch.ones(3, 4)
    more[2, 2] = 0.5
    ours = pruned(**batch, head_mask=more, output_attentions=True)
    expected = model(**batch, head_mask=mask * more, output_attentions=True)
    torch.testing.assert_close(ours.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(ours.attentions[2], expected.attentions[2][:, [1, 2]], **CLOSE)
    assert [part.shape[1] for part in ours.attentions] == [3, 4, 2]
    # Dropout of what remains is that of the whole model.
    for each in (model, pruned):
        for layer in each.layer_list():
            layer.attention.projections.dropout.p = 0.3
        each.train()
    torch.manual_seed(1)
    expected = model(**batch, head_mask=mask).logits
    torch.manual_seed(1)
    torch.testing.assert_close(pruned(**batch).logits, expected, **CLOSE)
