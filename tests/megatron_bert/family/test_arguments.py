# SPDX-License-Identifier: Apache-2.0
"""Arguments of forward passes of a wrong kind, type, shape or device, one after another in every class."""

from __future__ import annotations

import pytest
import torch

from megatron_bert import MegatronBertModel
from tests.megatron_bert.family.support import (
    BATCH,
    CLOSE,
    CONFIG,
    HEADS,
    LENGTH,
    arguments_for,
    as_tuples,
    assert_kinds_are_named,
    batch_for,
    build,
    changed,
    refused,
)

IDS = torch.ones(2, 4, dtype=torch.int64)
STATES = torch.randn(2, 5, 32)
#: Not as many layers as rows, so that none is taken for the other.
LAYERS, ATTENTION_HEADS = 3, CONFIG.num_attention_heads
CROSS = {"is_decoder": True, "add_cross_attention": True}


@pytest.fixture(scope="module")
def decoder():
    return build("Model", changed(**CROSS, num_hidden_layers=LAYERS))


@pytest.mark.parametrize("head", HEADS)
def test_kinds(head):
    assert_kinds_are_named(build(head), arguments_for(head))


@pytest.mark.parametrize("head", ["Model", "ForCausalLM"])
def test_kinds_of_decoders(head):
    assert_kinds_are_named(build(head, changed(**CROSS)), arguments_for(head))


def test_models_without_values():
    model = MegatronBertModel(changed(), device="meta", initial=False)
    assert "MegatronBertModel is on the meta device" in refused(lambda: model(IDS))


@pytest.mark.parametrize("name", ["start_positions", "end_positions"])
@pytest.mark.parametrize("kind", [torch.uint16, torch.float32, torch.bool])
def test_positions_of_answers_are_whole_numbers(name, kind):
    model = build("ForQuestionAnswering")
    assert f"{name} is of type {kind}" in refused(lambda: model(IDS, **{name: torch.ones(2).to(kind)}))


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["inputs_embeds", "encoder_hidden_states"])
def test_embeddings_are_floating_point(name, kind, decoder):
    ids = {} if name == "inputs_embeds" else {"input_ids": IDS}
    message = refused(lambda: decoder(**ids, **{name: torch.ones(2, 5, 32).to(kind)}))
    assert f"{name} is of type {kind}: give floating-point numbers" in message


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_what_is_narrower_than_the_model_is_widened(kind, decoder):
    narrow = STATES.to(kind)
    ours, expected = (decoder(IDS, encoder_hidden_states=states) for states in (narrow, narrow.float()))
    assert ours.last_hidden_state.equal(expected.last_hidden_state)
    past = tuple(tuple(part.to(kind) for part in entry) for entry in as_tuples(ours.past_key_values))
    wide = tuple(tuple(part.float() for part in entry) for entry in past)
    ours, expected = (decoder(IDS, past_key_values=given) for given in (past, wide))
    assert ours.last_hidden_state.equal(expected.last_hidden_state)


def test_what_is_wider_than_the_model(decoder):
    past = tuple(tuple(part.double() for part in entry) for entry in as_tuples(decoder(IDS).past_key_values))
    for given in ({"encoder_hidden_states": STATES.double()}, {"past_key_values": past}):
        message = refused(lambda given=given: decoder(IDS, **given))
        assert message == f"{next(iter(given))} is of type torch.float64, but the model of torch.float32: " + (
            "convert one of them"
        )


def test_autocast_takes_what_is_wider_than_the_model():
    decoder = build("Model", changed(**CROSS)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder(IDS, encoder_hidden_states=STATES).last_hidden_state.isfinite().all()
        message = refused(lambda: decoder(IDS, encoder_hidden_states=STATES.double()))
    assert "is of type torch.float64, but the model of torch.bfloat16" in message


def test_encoders_without_tokens(decoder):
    assert "encoder_hidden_states has no tokens" in refused(lambda: decoder(IDS, encoder_hidden_states=STATES[:, :0]))


@pytest.mark.parametrize(
    "shape",
    [
        (3, 2, 4, 3, 1),
        (3, 2, 4, 1, 5),
        (3, 2, 4, 4, 3),
        (3, 2, 1, 4, 4),
        (3, 2, 4, 4),
        (1, 2, 4, 1, 1),
        (3, 0, 4, 1, 1),
    ],
    ids=str,
)
def test_head_masks_of_other_tokens(shape):
    message = refused(lambda: build("Model", changed(num_hidden_layers=LAYERS))(IDS, head_mask=torch.ones(shape)))
    assert message == (
        f"head_mask has shape {list(shape)}, expected [4] or [3, 4] (layers, heads), or with sequences, queries and "
        "keys [3, 2 or 1, 4, 4 or 1, 4 or 1]"
    )


@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 4, 4), (2, 1, 4), (2, 4, 1), (1, 1, 1)], ids=str)
def test_head_masks_of_tokens(shape):
    model, (rows, queries, keys) = build("Model", changed(num_hidden_layers=LAYERS)), shape
    mask = torch.rand(LAYERS, rows, ATTENTION_HEADS, queries, keys)
    whole = mask.expand(LAYERS, 2, ATTENTION_HEADS, 4, 4)
    ours, expected = (model(IDS, head_mask=each).last_hidden_state for each in (mask, whole))
    torch.testing.assert_close(ours, expected, **CLOSE)


def test_head_masks_reach_to_tokens_and_to_an_encoder(decoder):
    ones = torch.ones(LAYERS, 2, ATTENTION_HEADS, 4, 4)
    message = refused(lambda: decoder(IDS, encoder_hidden_states=STATES, head_mask=ones))
    assert message.endswith("[3, 2 or 1, 4, 4 or 1, 1]")
    plain = decoder(IDS, encoder_hidden_states=STATES[:, :4])
    masked = decoder(IDS, encoder_hidden_states=STATES[:, :4], head_mask=ones)
    torch.testing.assert_close(masked.last_hidden_state, plain.last_hidden_state, **CLOSE)
    past = decoder(IDS).past_key_values
    assert "4, 2 or 1, 6 or 1]" in refused(lambda: decoder(IDS[:, :2], past_key_values=past, head_mask=ones))


CACHES = {
    "heads": (lambda part: part[:, :2], "holds [2, 2, 4, 8], expected tensors [2, 4, 4, 8]"),
    "size": (lambda part: part[..., :4], "holds [2, 4, 4, 4], expected tensors [2, 4, 4, 8]"),
    "batch": (lambda part: part[:1], "holds [1, 4, 4, 8], expected tensors [2, 4, 4, 8]"),
    "whole-numbers": (lambda part: part.long(), "is of type torch.int64: give floating-point numbers"),
    "array": (lambda part: part.detach().numpy(), "is a ndarray: give a tensor"),
    "none": (lambda part: None, "is a NoneType: give a tensor"),
    "meta": (lambda part: part.to("meta"), "is on meta, but the model on cpu"),
    "too-long": (lambda part: part.repeat(1, 1, 5, 1), "24 tokens, but the model has 20 positions"),
}


@pytest.mark.parametrize("cross", [False, True], ids=["alone", "cross"])
@pytest.mark.parametrize("case", CACHES)
def test_caches_of_other_models(case, cross, decoder):
    past = as_tuples(decoder(IDS, encoder_hidden_states=STATES[:, :4] if cross else None).past_key_values)
    change, message = CACHES[case]
    other = tuple(tuple(change(part) for part in entry) for entry in past)
    assert message in refused(lambda: decoder(IDS, past_key_values=other))


def test_parts_of_caches_of_other_lengths(decoder):
    past = as_tuples(decoder(IDS, encoder_hidden_states=STATES).past_key_values)
    for place, wrong in (
        (1, "[2, 4, 3, 8], expected tensors [2, 4, 4, 8]"),
        (3, "[2, 4, 4, 8], expected tensors [2, 4, 5"),
    ):
        layer = tuple(part[:, :, :-1] if number == place else part for number, part in enumerate(past[-1]))
        assert wrong in refused(lambda layer=layer: decoder(IDS, past_key_values=(*past[:-1], layer)))
    alone = build("Model", changed(is_decoder=True, num_hidden_layers=LAYERS))
    assert "but the model has no cross-attention" in refused(lambda: alone(IDS, past_key_values=past))


@pytest.mark.parametrize("case", ["ForMaskedLM", "ForTokenClassification", "ForPreTraining", "ForCausalLM"])
def test_labels_beside_inputs_of_a_wrong_rank(case):
    labels = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    model = build(case)
    assert "input_ids has shape [9]" in refused(lambda: model(labels[0], labels=labels))
    assert "neither is given" in refused(lambda: model(labels=labels))


NAN_HEADS = [head for head in HEADS if head != "Model"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("head", NAN_HEADS)
def test_ignored_labels_give_heads_gradients_of_zero_whatever_the_states_hold(head, value):
    model, arguments = build(head), arguments_for(head)
    labels = {
        name: torch.full_like(arguments[name], LENGTH if name.endswith("positions") else -100) for name in HEADS[head]
    }
    embeds = torch.full_like(arguments["inputs_embeds"], value)
    loss = model(inputs_embeds=embeds, **labels).loss
    assert str(float(loss.detach())) == "0.0"  # not -0.0
    loss.backward()
    outside = {name: each for name, each in model.named_parameters() if not name.startswith(("bert.enc", "bert.emb"))}
    assert outside
    for name, parameter in outside.items():
        assert parameter.grad is not None, name
        assert parameter.grad.eq(0).all(), name


def test_nothing_is_refused_that_works():
    model, batch = build("ForMaskedLM"), batch_for("ForMaskedLM")
    expected = model(**batch).logits
    given = batch | {"attention_mask": batch["attention_mask"].bool(), "token_type_ids": batch["token_type_ids"].int()}
    assert model(**given, output_attentions=0, return_dict=1).logits.equal(expected)
