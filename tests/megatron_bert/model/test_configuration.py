# SPDX-License-Identifier: Apache-2.0
"""Sizes of an encoder, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from megatron_bert.model.activations import ACTIVATIONS
from megatron_bert.model.attention import SelfAttention
from megatron_bert.model.configuration import MegatronBertConfig, RobertaConfig, config_from_dict
from megatron_bert.model.pretraining import BertForPretraining
from parallel.errors import UserError
from tests.megatron_bert.model.support import CONFIG
from tests.worlds import make_tensor_parallel, run_world


def test_heads_must_divide_the_hidden_size():
    with pytest.raises(UserError) as error:
        MegatronBertConfig(hidden_size=100, num_attention_heads=16)
    text = str(error.value)
    assert "hidden_size 100" in text
    assert "num_attention_heads 16" in text
    assert "\n" not in text


def test_unknown_activations_are_named_with_the_known_ones():
    with pytest.raises(UserError, match=r"hidden_act is 'relu6': choose one of") as error:
        MegatronBertConfig(hidden_act="relu6")
    for name in ACTIVATIONS:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("words", "multiple", "rows"), [(29056, 128, 29056), (30522, 128, 30592), (5, 8, 8), (8, 8, 8)]
)
def test_padded_vocabulary(words, multiple, rows):
    assert MegatronBertConfig(vocab_size=words, vocab_size_multiple=multiple).padded_vocab_size == rows


def test_initial_standard_deviations():
    config = MegatronBertConfig(num_hidden_layers=8, initializer_range=0.02)
    assert config.head_dim == 64
    assert config.output_init_std == pytest.approx(0.005)
    assert replace(config, scaled_output_init=False).output_init_std == 0.02


def test_plain_values_pass_through_json():
    config = RobertaConfig(id2label={1: "b", 0: "a"}, pruned_heads={3: [2, 1]}, eos_token_id=[2, 5])
    assert config_from_dict(json.loads(json.dumps(config.to_dict())), "a file") == config
    with pytest.raises(UserError, match="a file gives an encoder rotary_base, which it does not have"):
        config_from_dict(config.to_dict() | {"rotary_base": 1}, "a file")
    with pytest.raises(UserError, match=r"a file does not fit: hidden_size is 'x'"):
        config_from_dict({"hidden_size": "x"}, "a file")
    with pytest.raises(UserError, match="a file is of a gpt2: expected one of megatron-bert, bert, ibert"):
        config_from_dict({"model_type": "gpt2"}, "a file")


def test_the_default_is_the_345m_model():
    model = BertForPretraining(MegatronBertConfig(), device="meta")
    # Embeddings, 24 layers of 12 h^2 + 13 h, final norm, masked head, pair head.
    h = 1024
    embeddings = (29056 + 512 + 2) * h
    layers = 24 * (12 * h * h + 13 * h)
    heads = (h * h + h + 2 * h + 29056) + (h * h + h + 2 * h + 2)
    assert sum(parameter.numel() for parameter in model.parameters()) == embeddings + layers + 2 * h + heads


def test_a_model_without_pair_head():
    names = [
        name for name, _ in BertForPretraining(replace(CONFIG, binary_head=False), device="meta").named_parameters()
    ]
    assert not [name for name in names if name.startswith("pair_head")]


def _too_many_ranks() -> None:
    tp = make_tensor_parallel()
    with pytest.raises(UserError, match="num_attention_heads is 1, which a tensor-parallel size of 2"):
        SelfAttention(replace(CONFIG, num_attention_heads=1), tp=tp)
    with pytest.raises(UserError, match="the padded vocabulary is 91, which a tensor-parallel size of 2"):
        BertForPretraining(replace(CONFIG, vocab_size_multiple=1), tp=tp, device="meta")


def test_sizes_the_tensor_ranks_cannot_divide():
    run_world(2, _too_many_ranks)


def test_names_are_global_in_a_part_of_the_stack():
    from megatron_bert.model.encoder import Encoder

    config = replace(CONFIG, num_hidden_layers=4)
    with torch.device("meta"):
        lower, upper, all_layers = (Encoder(config, layers=part) for part in (range(2), range(2, 4), None))
    whole = {name for name, _ in all_layers.named_parameters()}
    parts = [{name for name, _ in part.named_parameters()} for part in (lower, upper)]
    assert parts[0] | parts[1] == whole
    assert not parts[0] & parts[1]
    assert "layers.3.mlp.output.weight" in parts[1]
    assert "final_norm.weight" in parts[1]
    assert next(lower.parameters()).device == torch.device("meta")
