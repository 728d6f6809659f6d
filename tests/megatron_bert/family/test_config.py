# SPDX-License-Identifier: Apache-2.0
"""The configuration: fields, names of classes, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_bert import IBertConfig, MegatronBertConfig
from parallel.errors import UserError


def _same(one, other) -> bool:
    """The same configuration, wherever and by whichever version it was written."""
    return all(
        value == other.to_dict().get(name)
        for name, value in one.to_dict().items()
        if name not in ("_name_or_path", "transformers_version", "architectures")
    )


def test_defaults_are_the_documented_ones():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.MegatronBertConfig().to_dict()
    ours = MegatronBertConfig()
    found = ours.to_dict()
    assert {name: found[name] for name in theirs} == theirs
    assert (ours.position_embedding_type, ours.num_labels) == ("absolute", 2)


def test_files_pass_both_ways(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = MegatronBertConfig(hidden_size=64, num_attention_heads=4, num_labels=3, is_decoder=True, eos_token_id=5)
    config.save_pretrained(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (theirs.hidden_size, theirs.num_labels, theirs.eos_token_id) == (64, 3, 5)
    theirs.save_pretrained(tmp_path)
    assert _same(MegatronBertConfig.from_pretrained(tmp_path), config)
    assert MegatronBertConfig.from_pretrained(tmp_path / "config.json", num_labels=4).num_labels == 4


def test_files_of_other_versions(tmp_path):
    old = {
        "architectures": ["MegatronBertModel"],
        "gradient_checkpointing": False,
        "tokenizer_type": "BertWordPieceCase",
        "transformers_version": "4.6.0",
        "id2label": {"0": "no", "1": "yes"},
        "pruned_heads": {"1": [0]},
        "dtype": "float16",
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = MegatronBertConfig.from_pretrained(tmp_path)
    assert (config.label2id, config.dtype) == ({"no": 0, "yes": 1}, torch.float16)
    assert config.pruned_heads == {1: [0]}
    assert _same(MegatronBertConfig.from_dict(json.loads(config.to_json_string(use_diff=False))), config)


def test_ids_that_are_not_set_stay_so_in_files(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.MegatronBertConfig(pad_token_id=None).save_pretrained(tmp_path)
    config = MegatronBertConfig.from_pretrained(tmp_path)
    assert config.pad_token_id is None
    config.save_pretrained(tmp_path)
    assert _same(MegatronBertConfig.from_pretrained(tmp_path), config)
    assert transformers.AutoConfig.from_pretrained(tmp_path).pad_token_id is None
    without_ends = IBertConfig(bos_token_id=None, eos_token_id=None)
    without_ends.save_pretrained(tmp_path)
    assert _same(IBertConfig.from_pretrained(tmp_path), without_ends)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (None, None)


def test_the_vocabulary_holds_the_ids_whichever_changes():
    config = MegatronBertConfig(vocab_size=60, pad_token_id=59, bos_token_id=58, eos_token_id=[3, 57])
    with pytest.raises(UserError, match=r"pad_token_id is 59, but vocab_size 59 has ids to 58"):
        config.vocab_size = 59
    assert config.vocab_size == 60
    config.pad_token_id = None
    with pytest.raises(UserError, match=r"eos_token_id is 57, but vocab_size 57 has ids to 56"):
        config.replaced(vocab_size=57, bos_token_id=None)


def test_names_of_classes_agree():
    config = MegatronBertConfig(num_labels=4)
    assert config.id2label[3] == "LABEL_3"
    assert config.replaced(num_labels=2).label2id == {"LABEL_0": 0, "LABEL_1": 1}
    named = config.replaced(id2label={1: "b", 0: "a", 2: "c"})
    assert (named.num_labels, list(named.id2label)) == (3, [0, 1, 2])
    assert named.replaced(hidden_size=512).label2id == {"a": 0, "b": 1, "c": 2}
    assert config.replaced(label2id={"x": 0}).num_labels == 1
    named.num_labels = 5
    assert named.label2id["LABEL_4"] == 4
    named.label2id = {"x": 0, "y": 1}
    assert (named.num_labels, named.id2label) == (2, {0: "x", 1: "y"})
    named.id2label = {0: "p"}
    assert (named.num_labels, named.label2id) == (1, {"p": 0})
    with pytest.raises(UserError, match=r"num_labels is 2, but id2label names 1"):
        MegatronBertConfig(num_labels=2, id2label={0: "p"})
    with pytest.raises(UserError, match="number them from 0"):
        MegatronBertConfig(id2label={1: "a", 2: "b"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0: give a whole number of 1 or more"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5"),
        ({"num_labels": -1}, "num_labels is -1"),
        ({"use_cache": "yes"}, "use_cache is 'yes': give true or false"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob is 1.0: give a probability"),
        ({"classifier_dropout": -0.1}, "classifier_dropout is -0.1"),
        ({"layer_norm_eps": "tiny"}, "layer_norm_eps is 'tiny'"),
        ({"hidden_act": "relu66"}, "hidden_act is 'relu66': give a function, or choose one of gelu, gelu_10, gelu_acc"),
        ({"position_embedding_type": "rotary"}, "choose one of absolute, relative_key, relative_key_query"),
        ({"problem_type": "ranking"}, "choose one of regression, single_label_classification"),
        ({"torch_dtype": "int8"}, "choose one of float32"),
        ({"add_cross_attention": True}, "add_cross_attention needs is_decoder=true"),
        ({"pad_token_id": -1}, "pad_token_id is -1: give the id of a token"),
        (
            {"pad_token_id": 29056},
            "pad_token_id is 29056, but vocab_size 29056 has ids to 29055: give the id",
        ),
        ({"bos_token_id": 99999}, "bos_token_id is 99999, but vocab_size 29056 has ids to 29055"),
        ({"eos_token_id": 99999}, "eos_token_id is 99999, but vocab_size 29056 has ids to 29055"),
        ({"eos_token_id": [1, 29056]}, "eos_token_id is 29056, but vocab_size 29056 has ids to 29055"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id is 'x'"),
        ({"pruned_heads": {0: list(range(16))}}, "each layer keeps at least one"),
        ({"pruned_heads": {24: [0]}}, "layers go to 23"),
        ({"pruned_heads": [1]}, "give numbers of heads by number of layer"),
        ({"id2label": ["a", "b"]}, "give a name for each class number"),
        ({"id2label": {"x": "a"}}, "give a name for each class number"),
    ],
)
def test_what_is_refused(values, message):
    with pytest.raises(UserError) as error:
        MegatronBertConfig(**values)
    assert message in str(error.value)
    assert "model." not in str(error.value), "a user of the classes has no settings"
    assert "\n" not in str(error.value)
    config = MegatronBertConfig()
    ((name, value),) = values.items()
    with pytest.raises(UserError):
        setattr(config, name, value)
    assert config == MegatronBertConfig()
    with pytest.raises(UserError):
        MegatronBertConfig.from_dict(values)


def test_fields_of_the_user_are_kept(tmp_path, caplog):
    config = MegatronBertConfig(color="red", layer_nrom_eps=1e-5)
    assert "MegatronBertConfig has no field layer_nrom_eps: did you mean layer_norm_eps?" in caplog.text
    config.save_pretrained(tmp_path)
    again = MegatronBertConfig.from_pretrained(tmp_path, color="blue")
    assert (again.color, again.layer_nrom_eps) == ("blue", 1e-5)


def test_activations_are_all_of_transformers_and_functions(tmp_path):
    MegatronBertConfig(hidden_act="relu6").save_pretrained(tmp_path)
    assert MegatronBertConfig.from_pretrained(tmp_path).hidden_act == "relu6"
    with pytest.raises(UserError, match="hidden_act is a function, which a file cannot hold"):
        MegatronBertConfig(hidden_act=torch.tanh).save_pretrained(tmp_path / "new")
