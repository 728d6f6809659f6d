# SPDX-License-Identifier: Apache-2.0
"""Every bad input and field of I-BERT is named in one sentence; defaults and orders are the documented ones."""

from __future__ import annotations

import inspect

import pytest
import torch

import megatron_bert
from megatron_bert import IBertConfig, MegatronBertConfig, MegatronBertModel
from parallel.errors import UserError
from tests.megatron_bert.family.support import BATCH, arguments_for, assert_kinds_are_named
from tests.megatron_bert.ibert.family.support import CONFIG, HEADS, batch_for, build, config_of

IDS = torch.full((2, 4), 5)

FIELDS = {
    "force_dequant": ("relu", "force_dequant is 'relu': choose one of none, gelu, softmax, layernorm, nonlinear"),
    "quant_mode": ("yes", "quant_mode is 'yes': give true or false"),
    "hidden_act": (
        "gelu_new",
        "hidden_act is 'gelu_new', but the integer function is of the exact GELU",
    ),
    "is_decoder": (True, "is_decoder is True, but I-BERT is an encoder: leave it at False"),
    "position_embedding_type": ("relative_key", "position_embedding_type is 'relative_key', but I-BERT has no other"),
    "layer_norm_placement": ("pre", "layer_norm_placement is 'pre', but I-BERT normalizes after each sum"),
    "max_position_embeddings": (2, "max_position_embeddings is 2, but positions start after pad_token_id 1"),
    "pad_token_id": (None, "pad_token_id is None, but positions are counted after it: give the id of padding"),
    "num_attention_heads": (5, "hidden_size 768 is not a multiple of num_attention_heads 5"),
}
INPUTS = {
    "nothing": ({}, "takes either input_ids or inputs_embeds, but neither is given"),
    "too-long": ({"input_ids": IDS.repeat(1, 5)}, "have 20 tokens, but the model has 18 positions: shorten them"),
    "too-long-embeds": ({"inputs_embeds": torch.zeros(2, 19, 32)}, "have 19 tokens, but the model has 18 positions"),
    "position": ({"input_ids": IDS, "position_ids": IDS * 4}, "position_ids holds 20, outside 0 to 19"),
    "id-too-large": ({"input_ids": IDS * 20}, "input_ids holds 100, outside 0 to 90 (vocab_size is 91)"),
    "type": ({"input_ids": IDS, "token_type_ids": IDS}, "token_type_ids holds 5, outside 0 to 1"),
    "mask": ({"input_ids": IDS, "attention_mask": IDS}, "attention_mask holds values other than 0 and 1"),
}


@pytest.mark.parametrize("act", ["gelo", "mish", "relu", torch.tanh], ids=["gelo", "mish", "relu", "function"])
def test_one_activation_is_there(act):
    with pytest.raises(UserError, match=r"hidden_act is .*: leave it at 'gelu'"):
        IBertConfig(hidden_act=act)


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name):
    value, message = FIELDS[name]
    with pytest.raises(UserError) as error:
        IBertConfig(**{name: value})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_assigned_fields_are_checked_and_taken_back():
    config = IBertConfig()
    with pytest.raises(UserError, match="force_dequant"):
        config.force_dequant = "all"
    assert config.force_dequant == "none"
    config.force_dequant = "nonlinear"


@pytest.mark.parametrize("case", INPUTS)
def test_inputs(case):
    given, message = INPUTS[case]
    with pytest.raises(UserError) as error:
        build("Model")(**given)
    assert message in str(error.value)


@pytest.mark.parametrize("head", HEADS)
def test_arguments_of_a_wrong_kind(head):
    assert_kinds_are_named(build(head), arguments_for(head))


def test_labels():
    with pytest.raises(UserError, match="labels holds 5, outside 0 to 4"):
        build("ForTokenClassification")(**batch_for("ForTokenClassification"), labels=torch.full((BATCH, 9), 5))
    with pytest.raises(UserError, match=r"the inputs have shape \[2, 4\], expected \[batch, choices, tokens\]"):
        build("ForMultipleChoice")(IDS)
    with pytest.raises(UserError, match="num_labels is 3, but an answer has a start and an end"):
        build("ForQuestionAnswering", config_of("ForQuestionAnswering", num_labels=3))
    out = build("ForMaskedLM")(IDS, labels=torch.full_like(IDS, -100))
    assert float(out.loss.detach()) == 0.0


def test_norms_of_another_placement():
    with pytest.raises(UserError, match="layer_norm_placement is 'post', but that of MegatronBertModel is 'pre'"):
        MegatronBertModel(MegatronBertConfig(layer_norm_placement="post"))


def test_defaults_are_the_documented_ones():
    transformers = pytest.importorskip("transformers")
    ours, theirs = IBertConfig(), transformers.IBertConfig()
    fields = set(transformers.IBertConfig.__annotations__) & set(IBertConfig.__dataclass_fields__)
    assert len(fields) >= 15
    assert {name: getattr(ours, name) for name in fields} == {name: getattr(theirs, name) for name in fields}
    documented = {"vocab_size": 30522, "hidden_size": 768, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    documented |= {"quant_mode": False, "force_dequant": "none", "layer_norm_eps": 1e-12, "type_vocab_size": 2}
    assert {name: getattr(ours, name) for name in documented} == documented


@pytest.mark.parametrize("head", HEADS)
def test_arguments_stand_in_the_documented_order(head):
    """That of transformers, and ``head_mask``, which newer versions left out, where it was."""
    transformers = pytest.importorskip("transformers")
    theirs = list(inspect.signature(getattr(transformers, f"IBert{head}").forward).parameters)
    ours = list(inspect.signature(getattr(megatron_bert, f"IBert{head}").forward).parameters)
    assert ours[ours.index("head_mask") - 1] == "position_ids"
    assert [name for name in ours if name != "head_mask"] == [name for name in theirs if name != "kwargs"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'atention_mask'"):
        build(head, CONFIG if head == "Model" else None)(IDS, atention_mask=IDS)
