# SPDX-License-Identifier: Apache-2.0
"""Every bad input is named before anything is computed; losses that have nothing to count are 0."""

from __future__ import annotations

import pytest
import torch

import megatron_bert
from megatron_bert import MegatronBertModel
from parallel.errors import UserError
from parallel.mesh import TensorParallel
from tests.megatron_bert.family.support import BATCH, CONFIG, HEADS, LENGTH, batch_for, build, changed, labels_for

IDS = torch.ones(2, 4, dtype=torch.int64)
EMBEDS = torch.zeros(2, 4, 32)

INPUTS = {
    "nothing": ({}, "takes either input_ids or inputs_embeds, but neither is given"),
    "both": ({"input_ids": IDS, "inputs_embeds": EMBEDS}, "but both are given"),
    "one-sequence": ({"input_ids": IDS[0]}, r"input_ids has shape [4], expected [batch, tokens]"),
    "fractions": ({"input_ids": IDS.float()}, "input_ids is of type torch.float32"),
    "no-tensor": ({"input_ids": [[1, 2]]}, "input_ids is a list: give a tensor"),
    "empty": ({"input_ids": IDS[:, :0]}, "the batch is empty (2 sequences of 0 tokens)"),
    "id-too-large": ({"input_ids": IDS * 91}, "input_ids holds 91, outside 0 to 90 (vocab_size is 91)"),
    "id-negative": ({"input_ids": -IDS}, "input_ids holds -1, outside 0 to 90"),
    "type": ({"input_ids": IDS, "token_type_ids": IDS * 2}, "token_type_ids holds 2, outside 0 to 1"),
    "types": ({"input_ids": IDS, "token_type_ids": IDS[:, :3]}, "token_type_ids has shape [2, 3], expected [2, 4]"),
    "position": ({"input_ids": IDS, "position_ids": IDS * 20}, "position_ids holds 20, outside 0 to 19"),
    "positions": ({"input_ids": IDS, "position_ids": IDS[:, :2]}, "position_ids has shape [2, 2], expected [2, 4] or"),
    "too-long": ({"input_ids": IDS.repeat(1, 6)}, "have 24 tokens, but the model has 20 positions"),
    "width": ({"inputs_embeds": EMBEDS[..., :8]}, "inputs_embeds has shape [2, 4, 8], expected [batch, tokens, 32]"),
    "embeddings": ({"inputs_embeds": [[0.0]]}, "inputs_embeds is a list: give a tensor"),
    "whole-embeddings": ({"inputs_embeds": EMBEDS.long()}, "inputs_embeds is of type torch.int64"),
    "head-mask-list": ({"input_ids": IDS, "head_mask": [None] * 3}, "head_mask is a list: give a tensor"),
    "embeddings-type": ({"inputs_embeds": EMBEDS.double()}, "inputs_embeds is of type torch.float64, but the model of"),
    "head-mask-batch": (
        {"input_ids": IDS, "head_mask": torch.ones(2, 3, 4, 1, 1)},
        "head_mask has shape [2, 3, 4, 1, 1]",
    ),
    "cache-number": ({"input_ids": IDS, "past_key_values": 3}, "past_key_values is an int: give what an earlier"),
    "mask-rank": ({"input_ids": IDS, "attention_mask": IDS[0]}, "attention_mask has shape [4], expected [2, 4]"),
    "mask-four": (
        {"input_ids": IDS, "attention_mask": IDS[:, None, None, :3]},
        "attention_mask has shape [2, 1, 1, 3]",
    ),
    "mask-size": ({"input_ids": IDS, "attention_mask": IDS[:, :3]}, "attention_mask has shape [2, 3], expected"),
    "mask-added": (
        {"input_ids": IDS, "attention_mask": torch.tensor([[0.0, -1e4, 0, 0]]).repeat(2, 1)},
        "attention_mask holds values other than 0 and 1",
    ),
    "head-mask": ({"input_ids": IDS, "head_mask": torch.ones(3)}, "head_mask has shape [3], expected [4] or [2, 4]"),
    "cache": (
        {"input_ids": IDS, "past_key_values": ((EMBEDS, EMBEDS),)},
        "past_key_values has 1 entries of [2]",
    ),
    "use-cache": ({"input_ids": IDS, "use_cache": True}, "only decoders keep keys and values"),
    "encoder": ({"input_ids": IDS, "encoder_hidden_states": EMBEDS}, "the model has no cross-attention"),
    "encoder-mask": ({"input_ids": IDS, "encoder_attention_mask": IDS}, "given without encoder_hidden_states"),
}


@pytest.fixture(scope="module")
def model():
    return build("Model")


@pytest.mark.parametrize("case", INPUTS)
def test_inputs(case, model):
    given, message = INPUTS[case]
    with pytest.raises(UserError) as error:
        model(**given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("head", HEADS)
def test_unknown_arguments(head):
    with pytest.raises(TypeError, match="unexpected keyword argument 'atention_mask'"):
        build(head)(IDS, atention_mask=IDS)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        getattr(megatron_bert, f"MegatronBert{head}")(CONFIG, color=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"past_key_values": ((EMBEDS, EMBEDS),)}, "past_key_values has 1 entries of [2] tensors, expected 2"),
        (
            {"past_key_values": ((EMBEDS, EMBEDS),) * 2},
            "past_key_values holds [2, 4, 32], expected tensors [2, 4, tokens, 8]",
        ),
        ({"encoder_hidden_states": EMBEDS[..., :8]}, "encoder_hidden_states has shape [2, 4, 8], expected [2, tokens"),
        ({"encoder_hidden_states": EMBEDS[:1]}, "encoder_hidden_states has shape [1, 4, 32]"),
        (
            {"encoder_hidden_states": EMBEDS, "encoder_attention_mask": IDS[:, :1]},
            "encoder_attention_mask has shape [2, 1], expected [2, 4]",
        ),
    ],
)
def test_inputs_of_decoders(given, message):
    decoder = build("Model", changed(is_decoder=True, add_cross_attention=True))
    with pytest.raises(UserError) as error:
        decoder(IDS, **given)
    assert message in str(error.value)


def test_relative_positions_end():
    decoder = build("Model", changed(is_decoder=True, add_cross_attention=True, position_embedding_type="relative_key"))
    with pytest.raises(UserError, match="encoder_hidden_states has 24 tokens, but there are relative positions for 20"):
        decoder(IDS, encoder_hidden_states=EMBEDS.repeat(1, 6, 1))


LABELS = {
    "word": ("ForMaskedLM", {"labels": IDS * 91}, "labels holds 91, outside 0 to 90"),
    "words": ("ForMaskedLM", {"labels": IDS[:, :2]}, "labels has shape [2, 2], expected [2, 4]"),
    "word-pretraining": ("ForPreTraining", {"labels": -IDS}, "labels holds -1, outside 0 to 90"),
    "pair": ("ForPreTraining", {"next_sentence_label": IDS[:, 0] * 2}, "next_sentence_label holds 2, outside 0 to 1"),
    "pairs": ("ForNextSentencePrediction", {"labels": IDS}, "labels has shape [8], expected [2]"),
    "next-word": ("ForCausalLM", {"labels": IDS * 91}, "labels holds 91, outside 0 to 90"),
    "class": ("ForSequenceClassification", {"labels": IDS[:, 0] * 5}, "labels holds 5, outside 0 to 4"),
    "classes": ("ForSequenceClassification", {"labels": IDS}, "expected a class number for each of 2 sequences"),
    "several": ("ForSequenceClassification", {"labels": EMBEDS[:, 0]}, "labels has shape [2, 32], expected [2, 5]"),
    "transposed": (
        "ForSequenceClassification",
        {"labels": torch.zeros(5, 2)},
        "labels has shape [5, 2], expected [2, 5]",
    ),
    "flat": ("ForSequenceClassification", {"labels": torch.zeros(10)}, "labels has shape [10], expected [2, 5]"),
    "class-list": ("ForSequenceClassification", {"labels": [0, 1]}, "labels is a list: give a tensor"),
    "pair-list": ("ForNextSentencePrediction", {"labels": [0, 1]}, "labels is a list: give a tensor"),
    "tag-list": ("ForTokenClassification", {"labels": [[0] * 4] * 2}, "labels is a list: give a tensor"),
    "start": ("ForQuestionAnswering", {"start_positions": 3}, "start_positions is an int: give a tensor"),
    "kept-place": ("ForCausalLM", {"logits_to_keep": torch.tensor([4])}, "logits_to_keep holds places outside of 4"),
    "tag": ("ForTokenClassification", {"labels": IDS * 5}, "labels holds 5, outside 0 to 4"),
    "tags": ("ForTokenClassification", {"labels": IDS[:, :1]}, "labels has shape [2, 1], expected [2, 4]"),
    "starts": ("ForQuestionAnswering", {"start_positions": IDS}, "start_positions has shape [8], expected [2]"),
    "choices": ("ForMultipleChoice", {}, "the inputs have shape [2, 4], expected [batch, choices, tokens]"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels(case):
    head, given, message = LABELS[case]
    with pytest.raises(UserError) as error:
        build(head)(IDS, **given)
    assert message in str(error.value)


def test_choices_of_all_inputs():
    choices = IDS.view(2, 2, 2)
    with pytest.raises(UserError, match=r"attention_mask has shape \[2, 4\], expected \[batch, choices, tokens\]"):
        build("ForMultipleChoice")(choices, attention_mask=IDS)
    with pytest.raises(UserError, match="labels holds 2, outside 0 to 1"):
        build("ForMultipleChoice")(choices, labels=torch.tensor([0, 2]))


@pytest.mark.parametrize("head", ["ForPreTraining", "ForMaskedLM", "ForCausalLM", "ForTokenClassification"])
def test_a_loss_without_labels_is_zero(head):
    model, batch = build(head), batch_for(head)
    loss = model(**batch, labels=torch.full((BATCH, LENGTH), -100)).loss
    assert float(loss.detach()) == 0.0
    loss.backward()
    # A gradient that is missing on one rank alone would stop data parallelism.
    unused = {"pooler", "seq_relationship"} if head == "ForPreTraining" else {"pooler"}
    for name, parameter in model.named_parameters():
        if not unused & set(name.split(".")):
            assert parameter.grad is not None, name
            assert parameter.grad.eq(0).all(), name


def test_regressions_of_several_values_have_a_value_for_each():
    model = build("ForSequenceClassification", changed(num_labels=3, problem_type="regression"))
    with pytest.raises(UserError, match=r"labels has shape \[3, 2\], expected \[2, 3\]"):
        model(IDS, labels=torch.zeros(3, 2))


def test_answers_that_are_cut_off():
    model, batch = build("ForQuestionAnswering"), batch_for("ForQuestionAnswering")
    beyond = torch.full((BATCH,), 50)
    assert float(model(**batch, start_positions=beyond, end_positions=beyond).loss.detach()) == 0.0


def test_a_loss_from_labels_alone():
    model, batch, labels = build("ForPreTraining"), batch_for("ForPreTraining"), labels_for("ForPreTraining")
    both = model(**batch, **labels).loss
    alone = [model(**batch, **{name: label}).loss for name, label in labels.items()]
    torch.testing.assert_close(alone[0] + alone[1], both)
    assert model(**batch).loss is None
    start = build("ForQuestionAnswering")(**batch, start_positions=torch.tensor([1, 2, 3])).loss
    assert start.isfinite()


def test_pretraining_without_a_pair_head():
    model, batch = build("ForPreTraining", add_binary_head=False), batch_for("ForPreTraining")
    assert model(**batch).seq_relationship_logits is None
    assert not any("pooler" in name or "seq_rel" in name for name, _ in model.named_parameters())
    with pytest.raises(UserError, match="there is no sentence-pair head"):
        model(**batch, next_sentence_label=torch.zeros(BATCH, dtype=torch.int64))


def test_without_a_pooler():
    model = build("Model", add_pooling_layer=False)
    assert model(IDS).pooler_output is None
    hidden, pooled = model(IDS, return_dict=False)
    assert hidden.shape == (2, 4, 32)
    assert pooled is None


def test_models():
    with pytest.raises(UserError, match="takes a MegatronBertConfig, but got a dict"):
        MegatronBertModel({"hidden_size": 32})
    with pytest.raises(UserError, match="divide matrices, not tokens"):
        MegatronBertModel(CONFIG, tp=TensorParallel(sequence=True))
    with pytest.raises(UserError, match="an answer has a start and an end"):
        build("ForQuestionAnswering", changed(num_labels=3))
    model = build("Model")
    with pytest.raises(UserError, match="heads to 3"):
        model.prune_heads({0: [4]})
    with pytest.raises(UserError, match="each layer keeps at least one"):
        model.prune_heads({0: [0, 1, 2, 3]})
    with pytest.raises(UserError, match="give numbers of heads by number of layer"):
        model.prune_heads({"first": [0]})
    with pytest.raises(UserError, match="pad_to_multiple_of is 0: give 1 or more"):
        model.resize_token_embeddings(10, pad_to_multiple_of=0)
    assert not model.config.pruned_heads
    with pytest.raises(AttributeError, match="no attribute 'MegatronBertForPoetry'"):
        megatron_bert.MegatronBertForPoetry  # noqa: B018


def test_outputs_by_name_and_place(model):
    out = model(IDS, output_attentions=True)
    assert list(out) == ["last_hidden_state", "pooler_output", "attentions"]
    assert out[0] is out["last_hidden_state"] is out.last_hidden_state
    assert out[-1] is out.attentions
    assert out[:2] == out.to_tuple()[:2]
    assert len(out) == 3
    assert "hidden_states" not in out
    assert out.get("hidden_states") is None
    with pytest.raises(KeyError):
        out["hidden_states"]


def test_defaults_from_the_configuration():
    model = build("Model", changed(output_hidden_states=True, return_dict=False))
    assert len(model(IDS)) == 3
    model.config.return_dict = True
    assert model(IDS, output_hidden_states=False).hidden_states is None


def test_resized_vocabularies():
    model = build("ForMaskedLM", changed(tie_word_embeddings=False))
    before = model.get_input_embeddings().weight[:91].clone()
    logits = model(IDS).logits
    assert model.resize_token_embeddings(130) is model.get_input_embeddings()
    assert model.config.vocab_size == 130
    assert model.get_input_embeddings().weight[:91].equal(before)
    assert model.get_input_embeddings().weight.shape == (130, 32)
    torch.testing.assert_close(model(IDS).logits[..., :91], logits)
    assert model(IDS + 128).logits.shape == (2, 4, 130)
    model.resize_token_embeddings(80, pad_to_multiple_of=50)
    assert model.config.vocab_size == 100
    with pytest.raises(UserError, match="outside 0 to 99"):
        model(IDS * 100)
    assert model.get_output_embeddings() is not model.get_input_embeddings()


def test_a_vocabulary_is_not_cut_off_before_its_special_tokens():
    model = build("ForMaskedLM", changed(pad_token_id=85))
    before = model.get_input_embeddings().weight.clone()
    with pytest.raises(UserError, match=r"pad_token_id is 85, but vocab_size 80 has ids to 79"):
        model.resize_token_embeddings(80)
    assert model.config.vocab_size == 91
    assert model.get_input_embeddings().weight.equal(before)
