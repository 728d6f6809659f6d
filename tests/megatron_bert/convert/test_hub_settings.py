# SPDX-License-Identifier: Apache-2.0
"""The config.json files that people have: fields left out, null, spelled otherwise, or of other tools."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_bert import MegatronBertConfig
from megatron_bert.convert.conversion import convert
from megatron_bert.convert.opening import open_checkpoint
from megatron_bert.family.bert import MegatronBertModel
from megatron_bert.model.activations import GELU_APPROXIMATIONS, GELU_SYNONYMS
from parallel.errors import UserError
from tests.megatron_bert.convert.generator import Sizes, draw, write_checkpoint

#: Google's first converter left these in many files.
_GOOGLE = {"directionality": "bidi", "pooler_fc_size": 768, "pooler_num_fc_layers": 3, "pooler_type": "first_token"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    source = write_checkpoint(folder / "megatron", draw(Sizes(layers=1)), Sizes(layers=1))
    convert(source, folder / "model", to="huggingface")
    return folder / "model"


def _with(model: Path, folder: Path, changes: dict[str, Any], without: tuple[str, ...] = ()) -> Path:
    """A copy of the model whose config.json is another."""
    shutil.copytree(model, folder / "changed")
    path = folder / "changed/config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in without}))
    return path.parent


@pytest.mark.parametrize("changes", [{"position_embedding_type": None}, _GOOGLE, {"model_type": None}])
def test_fields_without_meaning_change_nothing(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    changed = _with(model, tmp_path, changes)
    with open_checkpoint(model) as expected, open_checkpoint(changed) as found:
        assert found.config == expected.config
    configs = [MegatronBertConfig.from_pretrained(folder).encoder_config() for folder in (changed, model)]
    assert configs[0] == configs[1]
    MegatronBertModel.from_pretrained(changed)


@pytest.mark.parametrize(("name", "usual"), GELU_SYNONYMS.items())
def test_other_names_of_gelu(model: Path, tmp_path: Path, name: str, usual: str) -> None:
    changed = _with(model, tmp_path, {"hidden_act": name})
    with open_checkpoint(changed) as found:
        assert found.config.hidden_act == usual
    assert MegatronBertConfig.from_pretrained(changed).encoder_config().hidden_act == usual


def test_other_names_of_gelu_compute_the_same_in_transformers() -> None:
    activations = pytest.importorskip("transformers.activations")
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    for name, usual in GELU_SYNONYMS.items():
        expected = torch.nn.functional.gelu(x, approximate=GELU_APPROXIMATIONS[usual])
        torch.testing.assert_close(activations.ACT2FN[name](x), expected, rtol=0, atol=1e-9)


def test_a_model_type_that_is_left_out_is_known_by_the_norms(model: Path, tmp_path: Path) -> None:
    with open_checkpoint(_with(model, tmp_path, {}, without=("model_type",))) as state:
        assert "gives no model_type: megatron-bert was taken" in " ".join(state.facts.assumptions)


def test_a_model_type_that_is_left_out_of_another_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    changed = _with(tmp_path / "bert", tmp_path, {}, without=("model_type",))
    with pytest.raises(UserError, match="gives no model_type: expected megatron-bert"), open_checkpoint(changed):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**4000}, "gives hidden_size a number that no model has"),
        ({"hidden_size": None}, "gives no hidden_size"),
        ({"hidden_size": "64"}, "hidden_size is '64': give a whole number of 1 or more"),
        ({"vocab_size": "100"}, "says vocab_size '100', but there are"),
        ({"hidden_act": ["gelu"]}, "hidden_act is .*: choose one of gelu"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps is inf: give a number of 0 or more"),
        ({"hidden_dropout_prob": 1}, "hidden_dropout_prob is 1: give a probability"),
        ({"model_type": ["bert"]}, r"has model_type .*: expected megatron-bert"),
    ],
)
def test_values_that_cannot_be(model: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error, open_checkpoint(_with(model, tmp_path, changes)):
        pass
    assert len(str(error.value)) < 1000


def test_several_ends_are_kept(model: Path, tmp_path: Path) -> None:
    with open_checkpoint(_with(model, tmp_path, {"eos_token_id": [2, 3]})) as state:
        assert state.config.eos_token_id == [2, 3]


@pytest.mark.parametrize("quantized", [False, True])
def test_buffers_of_a_floating_point_i_bert_mean_nothing(tmp_path: Path, quantized: bool) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.IBertConfig(**sizes, vocab_size=60, max_position_embeddings=20, quant_mode=quantized)
    transformers.IBertForMaskedLM(config).save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as state:
        notes = [note for note in state.warnings if "quantize the model again" in note]
    assert len(notes) == quantized
