# SPDX-License-Identifier: Apache-2.0
"""Every I-BERT class beside transformers' with the same weights: outputs, losses and gradients, quant_mode off."""

from __future__ import annotations

import pytest
import torch

from tests.megatron_bert.family.support import (
    BATCH,
    CLOSE,
    LENGTH,
    Both,
    assert_gradients_close,
    assert_outputs_close,
    assert_trains_as,
    labels_for,
    peer_of,
)
from tests.megatron_bert.ibert.family.support import CONFIG, HEADS, PAD, batch_for, build, config_of

transformers = pytest.importorskip("transformers")
ALL = {"output_hidden_states": True, "output_attentions": True}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return Both(build, tmp_path_factory.mktemp("peers"))


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("head", HEADS)
def test_outputs_losses_and_gradients(head, ragged, both):
    model, peer = both(head)
    assert_trains_as(model, peer, batch_for(head, ragged=ragged) | labels_for(head))


@pytest.mark.parametrize("head", HEADS)
def test_everything_it_returns(head, both):
    model, peer = both(head)
    batch = batch_for(head)
    ours, theirs = model(**batch, **ALL), peer(**batch, **ALL)
    assert_outputs_close(ours, theirs)
    assert len(ours.hidden_states) == CONFIG.num_hidden_layers + 1
    assert list(ours) == list(theirs)
    as_tuple = model(**batch, **ALL, **labels_for(head), return_dict=False)
    expected = peer(**batch, **ALL, **labels_for(head), return_dict=False)
    assert len(as_tuple) == len(expected)
    torch.testing.assert_close(as_tuple[0], expected[0], **CLOSE)
    torch.testing.assert_close(as_tuple[-1][-1], expected[-1][-1], **CLOSE)


def test_without_a_pooler(both, tmp_path):
    model = build("Model", add_pooling_layer=False)
    assert model(**batch_for("Model"), return_dict=False)[1] is None
    assert model(**batch_for("Model")).pooler_output is None


@pytest.mark.parametrize("rows", [1, BATCH])
def test_positions(rows, both):
    model, peer = both("Model")
    positions = torch.randint(0, 20, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    batch = batch_for("Model") | {"position_ids": positions}
    assert_outputs_close(model(**batch), peer(**batch))


def test_no_mask_and_no_types(both):
    model, peer = both("Model")
    ids = batch_for("Model", ragged=False)["input_ids"]
    assert_outputs_close(model(ids), peer(ids))


def test_as_long_as_it_goes(both):
    # Twenty positions, of which padding has one and two stand unused before the first token.
    model, peer = both("Model")
    ids = torch.randint(2, 91, (2, 22), generator=torch.Generator().manual_seed(2))
    ids[:, 18:] = PAD
    assert_outputs_close(model(ids), peer(ids))


@pytest.mark.parametrize("head", ["Model", "ForMultipleChoice"])
def test_embeddings_in_place_of_words(head, both):
    model, peer = both(head)
    batch = batch_for(head)
    shape = (*batch.pop("input_ids").shape, CONFIG.hidden_size)
    embeds = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    mine, yours = embeds.clone().requires_grad_(), embeds.clone().requires_grad_()
    ours, theirs = model(inputs_embeds=mine, **batch), peer(inputs_embeds=yours, **batch)
    assert_outputs_close(ours, theirs)
    ours[0].square().sum().backward()
    theirs[0].square().sum().backward()
    torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-4, atol=1e-5 * float(yours.grad.abs().max()))


def test_padding_gets_no_gradient_from_where_it_is_looked_up(both):
    model, peer = both("Model")
    for each in (model, peer):
        each(batch_for("Model", ragged=False)["input_ids"]).last_hidden_state.square().sum().backward()
    assert model.get_input_embeddings().weight.grad[PAD].eq(0).all()
    assert model.embeddings.position_embeddings.weight.grad[PAD].eq(0).all()
    assert_gradients_close(model, peer)


@pytest.mark.parametrize(
    ("labels", "classes", "problem"),
    [
        (torch.linspace(-1, 1, BATCH), 1, None),
        (torch.linspace(-1, 1, 5 * BATCH).view(BATCH, 5), 5, "regression"),
        (torch.tensor([[1.0, 0, 0, 1, 0]]).repeat(BATCH, 1), 5, None),
    ],
    ids=["regression", "regression-of-several", "multi-label"],
)
def test_problem_types(labels, classes, problem, tmp_path):
    head = "ForSequenceClassification"
    model = build(head, config_of(head, num_labels=classes, problem_type=problem))
    peer = peer_of(model, tmp_path)
    assert_trains_as(model, peer, batch_for(head) | {"labels": labels})


@pytest.mark.parametrize("seed", range(6))
def test_random_configurations(seed, tmp_path):
    """Sizes, ties, padding id and class at random."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    head = HEADS[1 + seed % 5]
    heads = pick(1, 2, 3, 4)
    model = build(
        head,
        config_of(
            head,
            vocab_size=pick(91, 96, 130),
            hidden_size=heads * pick(8, 12),
            num_attention_heads=heads,
            num_hidden_layers=pick(1, 2, 4),
            intermediate_size=pick(24, 56),
            max_position_embeddings=pick(12, 40),
            type_vocab_size=pick(2, 3),
            layer_norm_eps=pick(1e-12, 1e-5),
            pad_token_id=pick(0, 1),
            tie_word_embeddings=pick(True, False),
        ),
    )
    peer = peer_of(model, tmp_path)
    assert_trains_as(model, peer, batch_for(head) | labels_for(head))


@pytest.mark.parametrize("head", HEADS)
def test_skipping_padding_changes_no_real_token(head):
    batch = batch_for(head)
    whole, skipping = (build(head, skip_padding=skip)(**batch, **labels_for(head)) for skip in (False, True))
    if head not in ("ForMaskedLM", "ForTokenClassification"):  # their labels stand on padding too
        real = batch["attention_mask"].bool()
        for name in ("last_hidden_state", "start_logits"):
            if name in whole:
                torch.testing.assert_close(skipping[name][real], whole[name][real], **CLOSE)
    if "logits" in whole and whole.logits.dim() == 2:
        torch.testing.assert_close(skipping.logits, whole.logits, **CLOSE)


def test_gradient_checkpointing_changes_no_bit(both):
    model, _ = both("ForMaskedLM")
    batch = batch_for("ForMaskedLM") | labels_for("ForMaskedLM")
    results = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        model(**batch).loss.backward()
        results.append([p.grad.clone() for p in model.parameters()])
    model.activation_checkpointing_disable()
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
