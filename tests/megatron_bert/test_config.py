# SPDX-License-Identifier: Apache-2.0
"""Settings as models: the checks between fields, YAML and JSON schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import BaseModel, ValidationError

from megatron_bert.cli import main
from megatron_bert.config import ModelSettings, Settings
from megatron_bert.config_checks import check_settings
from megatron_bert.config_file import validated
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.section import Section
from parallel.errors import UserError

TREE: dict[str, Any] = {
    "model": {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6, "max_position_embeddings": 64},
    "tokenizer": {"path": "vocab.txt"},
    "data": {"train": "corpus", "seq_length": 32},
    "training": {"run_dir": "run", "steps": 100, "global_batch_size": 24, "micro_batch_size": 4, "device": "cpu"},
}


def make(**changes: Any) -> Settings:
    """Settings with keys of the form ``section__key`` changed."""
    tree = {section: dict(values) for section, values in TREE.items()}
    for name, value in changes.items():
        section, key = name.split("__")
        tree.setdefault(section, {})[key] = value
    return validated(tree, Settings, source="test")


def test_settings_that_fit() -> None:
    layout = check_settings(make(parallel__tensor=2, parallel__pipeline=2), 12)
    assert (layout.tensor, layout.pipeline, layout.data, layout.data_shard) == (2, 2, 3, 1)
    settings = make(parallel__sharding="hybrid", parallel__shard_size=3)
    assert check_settings(settings, 6).data_shard == 3
    other = make(model__hidden_act="relu")
    check_settings(other, 1)
    assert other.model_config_for(100, 0).hidden_act == "relu"
    assert check_settings(make(parallel__sharding="full"), 6).data_shard == 6


@pytest.mark.parametrize(
    ("world", "changes", "words"),
    [
        (4, {"parallel__tensor": 3}, ["tensor 3", "4 processes", "parallel.tensor"]),
        (4, {"parallel__data": 3}, ["data 3", "4 processes", "parallel.data"]),
        (1, {"parallel__sequence": True}, ["parallel.sequence", "parallel.tensor of 2 or more"]),
        (1, {"model__hidden_act": "relu6"}, ["model.hidden_act", "'relu6'", "gelu"]),
        (1, {"model__hidden_size": 50}, ["model.hidden_size 50", "model.num_attention_heads 6"]),
        (4, {"parallel__tensor": 4}, ["model.num_attention_heads is 6", "parallel.tensor 4"]),
        (2, {"parallel__tensor": 2, "model__intermediate_size": 97}, ["model.intermediate_size is 97", "tensor 2"]),
        (
            3,
            {"parallel__tensor": 3, "model__vocab_size_multiple": 128},
            ["model.vocab_size_multiple is 128", "set model.vocab_size_multiple=384"],
        ),
        (
            2,
            {
                "parallel__tensor": 2,
                "parallel__sequence": True,
                "data__seq_length": 31,
                "training__micro_batch_size": 1,
            },
            ["parallel.sequence", "31 tokens", "2 tensor ranks", "change data.seq_length"],
        ),
        (1, {"data__seq_length": 65}, ["data.seq_length 65", "model.max_position_embeddings 64", "raise the latter"]),
        (1, {"model__type_vocab_size": 1}, ["data.pair_objective sop", "model.type_vocab_size", "set it to 2"]),
        (1, {"data__row_samples": 3}, ["data.row_samples is 3", "data.packed is false", "data.packed=true"]),
        (1, {"data__max_predictions": 33}, ["data.max_predictions 33", "data.seq_length 32", "lower it"]),
        (
            4,
            {},
            ["training.global_batch_size 24", "size 4 x training.micro_batch_size 4 = 16", "change one"],
        ),
        (1, {"parallel__schedule": "2f2b"}, ["'2f2b'", "choose one of", "zero-bubble-h1"]),
        (2, {"parallel__pipeline": 2, "parallel__virtual_stages": 2}, ["'1f1b'", "2 virtual stages", "exactly 1"]),
        (1, {"parallel__stage_layers": [1, 3]}, ["parallel.stage_layers [1, 3]", "give 1 numbers", "4 layers"]),
        (6, {"parallel__pipeline": 6}, ["4 layers", "6 pipeline stages", "use fewer stages"]),
        (
            2,
            {"parallel__pipeline": 2, "parallel__schedule": "zero-bubble-h1", "training__compile": True},
            ["parallel.schedule", "training.compile=false"],
        ),
        (1, {"learning_rate__minimum": 1.0}, ["learning_rate.minimum 1.0", "learning_rate.peak", "lower it"]),
        (1, {"learning_rate__warmup_steps": 100}, ["learning_rate.warmup_steps 100", "step 100", "shorten"]),
        (
            1,
            {"learning_rate__warmup_steps": 50, "learning_rate__decay_steps": 50},
            ["learning_rate.warmup_steps 50", "raise learning_rate.decay_steps"],
        ),
        (1, {"learning_rate__wsd_decay_steps": 5}, ["learning_rate.wsd_decay_steps", "schedule is linear", "wsd"]),
        (
            1,
            {
                "learning_rate__schedule": "wsd",
                "learning_rate__wsd_decay_steps": 91,
                "learning_rate__warmup_steps": 10,
            },
            ["learning_rate.wsd_decay_steps 91", "90 steps after warm-up", "shorten it"],
        ),
        (2, {"parallel__sharding": "hybrid"}, ["parallel.sharding is hybrid", "parallel.shard_size is None"]),
        (2, {"parallel__shard_size": 2}, ["parallel.sharding is none", "parallel.shard_size is 2"]),
        (
            6,
            {"parallel__sharding": "hybrid", "parallel__shard_size": 4},
            ["6 data-parallel ranks", "shard groups of 4", "choose a shard size"],
        ),
        (1, {"precision__compute": "float16"}, ["precision.compute float16", "choose bfloat16 or float32"]),
    ],
)
def test_settings_that_do_not_go_together(world: int, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_settings(make(**changes), world)
    text = str(caught.value)
    for word in words:
        assert word in text
    assert "\n" not in text
    assert ": " in text  # what is wrong, and what to do


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate__peak", float("inf")),
        ("optimizer__weight_decay", float("inf")),
        ("optimizer__clip_grad_norm", float("nan")),
        ("optimizer__eps", 1e-300),
        ("model__layer_norm_eps", 1e-300),
        ("learning_rate__peak", 1e300),
        ("learning_rate__minimum", 1e4),
        ("optimizer__weight_decay", 1e5),
        ("optimizer__clip_grad_norm", 1e39),
        ("model__initializer_range", 1e39),
        ("model__layer_norm_eps", 1e39),
        ("precision__initial_loss_scale", 1e39),
        ("parallel__timeout_seconds", 1e30),
        ("model__hidden_size", True),
        ("training__seed", False),
        ("parallel__stage_layers", [True, 3]),
    ],
)
def test_numbers_that_nothing_can_be_computed_with(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^test: {name.replace('__', '.')} is "):
        make(**{name: value})


@pytest.mark.parametrize("packed", [False, True])
def test_sequence_parallelism_divides_the_tokens_of_a_micro_batch(packed: bool) -> None:
    layout: dict[str, Any] = {"parallel__tensor": 2, "parallel__sequence": True, "data__packed": packed}
    odd = {"data__seq_length": 31, "training__micro_batch_size": 3, "training__global_batch_size": 3}
    with pytest.raises(UserError, match="93 tokens of a micro batch"):
        check_settings(make(**layout, **odd), 2)
    check_settings(make(**layout, **(odd | {"data__seq_length": 32})), 2)


def test_slots_of_a_row_are_as_many_as_its_samples_can_mask() -> None:
    for probability, most in ((0.15, 4), (0.15, 40), (0.4, 3), (0.01, 20)):
        settings = make(data__mask_probability=probability, data__packed=True)
        counted = [max(1, round(n * probability)) for n in range(33)]
        best = np.full((most + 1, 33), -999)  # samples, tokens -> masked tokens
        best[0] = 0
        for samples in range(1, most + 1):
            for tokens in range(3, 33):
                best[samples, tokens] = max(best[samples - 1, tokens - n] + counted[n] for n in range(3, tokens + 1))
        assert best.max() <= settings.row_slots(most) <= best.max() + most / 2 + 1
    assert make(data__max_predictions=2, data__packed=True).row_slots(3) == 6


def test_edges_that_fit() -> None:
    check_settings(make(learning_rate__warmup_steps=99), 1)
    check_settings(make(learning_rate__warmup_steps=100, learning_rate__schedule="constant"), 1)
    check_settings(make(learning_rate__schedule="wsd", learning_rate__wsd_decay_steps=100), 1)
    check_settings(make(data__seq_length=64, data__max_predictions=64), 1)
    check_settings(make(model__type_vocab_size=1, data__pair_objective="none"), 1)


def test_defaults_that_depend_on_others() -> None:
    settings = make()
    assert settings.max_predictions == 5  # 0.15 x 32, rounded
    config = settings.model_config_for(vocab_size=130, pad_token_id=3)
    assert (config.intermediate_size, config.padded_vocab_size, config.pad_token_id) == (192, 256, 3)
    assert config.binary_head
    assert not make(data__pair_objective="none").model_config_for(130, 0).binary_head
    assert make(data__max_predictions=7).max_predictions == 7


@pytest.mark.parametrize(
    ("section", "key", "value"), [("training", "steps", 1), ("data", "train", ()), (None, "model", None)]
)
def test_settings_cannot_change(section: str | None, key: str, value: object) -> None:
    settings = make()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(getattr(settings, section) if section else settings, key, value)


def test_dump_can_be_read_again() -> None:
    settings = make(
        model__from=Path("somewhere") / "checkpoint",
        data__train=["a", {"prefix": "b", "weight": 2.5}],
        learning_rate__peak=3e-5,
        parallel__stage_layers=[4],
    )
    tree = yaml.safe_load(settings.dump())
    assert tree["model"]["from"] == "somewhere/checkpoint"
    assert "from_" not in tree["model"]
    again = validated(tree, Settings, source="dump")
    assert again == settings
    assert again.model.from_ == Path("somewhere/checkpoint")


def sections(model: type[BaseModel], seen: set[type[BaseModel]]) -> set[type[BaseModel]]:
    seen.add(model)
    for field in model.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            for inner in (kind, *getattr(kind, "__args__", ())):
                if isinstance(inner, type) and issubclass(inner, BaseModel) and inner not in seen:
                    sections(inner, seen)
    return seen


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return Settings.model_json_schema()


class Owner(Section):
    model: ModelSettings


@pytest.mark.parametrize(
    "name", sorted(ModelSettings.model_fields.keys() - {"from_", "hidden_act", "scaled_output_init"})
)
def test_sizes_have_the_bounds_of_the_encoder(name: str) -> None:
    with pytest.raises(UserError, match=rf"^test: model\.{name} is -1"):
        validated({"model": {name: -1}}, Owner, "test")
    with pytest.raises(UserError, match=rf"^{name} is -1"):
        MegatronBertConfig(**{name: -1})


class TestSchema:
    def test_command_prints_it(self, schema: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["config-schema"]) == 0
        assert json.loads(capsys.readouterr().out) == schema

    def test_every_reference_leads_somewhere(self, schema: dict[str, Any]) -> None:
        text = json.dumps(schema)
        names = {part.split('"')[0] for part in text.split("#/$defs/")[1:]}
        assert names == set(schema["$defs"])

    def test_sections_are_described_and_closed(self, schema: dict[str, Any]) -> None:
        for kind in sections(Settings, set()):
            found = schema if kind is Settings else schema["$defs"][kind.__name__]
            assert found["additionalProperties"] is False
            assert set(found["properties"]) == {field.alias or name for name, field in kind.model_fields.items()}
            for name, field in found["properties"].items():
                target = schema["$defs"].get(field.get("$ref", "").rpartition("/")[2], {})
                assert field.get("description") or target.get("description"), f"{kind.__name__}.{name}"

    def test_corpora_may_be_strings(self, schema: dict[str, Any]) -> None:
        fields = schema["$defs"]["DataSettings"]["properties"]
        for name, others in (("train", []), ("valid", [{"type": "null"}])):
            text, several, *rest = fields[name]["anyOf"]
            assert text == {"type": "string"}
            assert several["type"] == "array"
            assert {"type": "string"} in several["items"]["anyOf"]
            assert rest == others
