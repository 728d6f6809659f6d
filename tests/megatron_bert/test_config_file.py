# SPDX-License-Identifier: Apache-2.0
"""Settings files and overrides, and what is said of mistakes in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_bert.config import Settings
from megatron_bert.config_file import load_settings, read_tree
from parallel.errors import UserError

TEXT = """
tokenizer: {path: vocab.txt}
data:
  train: corpus
training:
  run_dir: run
  steps: 100
  global_batch_size: 24
  micro_batch_size: 4
checkpoint:
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(TEXT.replace("checkpoint:\n", ""), encoding="utf-8")
    return path


def load(file: Path, *overrides: str) -> Settings:
    return load_settings(file, list(overrides))


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(file, *overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


class TestOverrides:
    def test_no_truth_value_is_a_number(self, file: Path) -> None:
        for override in ("training.steps=true", "optimizer.weight_decay_by_name={'*': true}"):
            assert "true and false are not a value for it" in refusal(file, override)

    @pytest.mark.parametrize(("given", "expected"), [("no", False), ("yes", True), ("off", False), ("True", True)])
    def test_truth_values(self, file: Path, given: str, expected: bool) -> None:
        """As YAML 1.1 writes them too, though ``no`` is text where a setting is text."""
        assert load_settings(file, [f"logging.tensorboard={given}"]).logging.tensorboard is expected

    def test_values_are_yaml(self, file: Path) -> None:
        settings = load(
            file,
            "training.steps=7",
            "learning_rate.peak=3.0e-4",
            "data.packed=true",
            "parallel.stage_layers=[10, 14]",
            "training.max_minutes=null",
            "data.split='90,10,0'",
            "model.from=some=where",
        )
        assert settings.training.steps == 7
        assert settings.learning_rate.peak == 3e-4
        assert settings.data.packed is True
        assert settings.parallel.stage_layers == [10, 14]
        assert settings.training.max_minutes is None
        assert settings.data.split == "90,10,0"
        assert settings.model.from_ == Path("some=where")

    def test_the_last_wins(self, file: Path) -> None:
        assert load(file, "training.steps=7", "training.steps=8").training.steps == 8

    def test_other_keys_stay(self, file: Path) -> None:
        training = load(file, "training.steps=7").training
        assert (training.global_batch_size, training.micro_batch_size) == (24, 4)

    def test_a_section_that_is_empty_in_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "settings.yaml"
        path.write_text(TEXT, encoding="utf-8")
        assert load(path, "checkpoint.keep=5").checkpoint.keep == 5

    @pytest.mark.parametrize("override", ["training.steps", "steps=5", ".steps=5", "training.=5", "=5", "a..b=5"])
    def test_form(self, file: Path, override: str) -> None:
        assert "is not of the form section.key=value, such as training.steps=100" in refusal(file, override)

    def test_below_a_value(self, file: Path) -> None:
        text = refusal(file, "training.steps.deep=5")
        assert "'training.steps.deep=5'" in text
        assert "steps holds a value" in text

    def test_broken_yaml(self, file: Path) -> None:
        text = refusal(file, "parallel.stage_layers=[1, 2")
        assert "not valid YAML" in text
        assert "quote it" in text


class TestCorpora:
    def corpora(self, file: Path, value: str, name: str = "train") -> list[tuple[str, float]]:
        found = getattr(load(file, f"data.{name}={value}").data, name)
        return [(str(corpus.prefix), corpus.weight) for corpus in found]

    def test_string(self, file: Path) -> None:
        assert self.corpora(file, "a/b") == [("a/b", 1.0)]

    def test_strings(self, file: Path) -> None:
        assert self.corpora(file, "[a, b]") == [("a", 1.0), ("b", 1.0)]

    def test_mappings(self, file: Path) -> None:
        assert self.corpora(file, "[{prefix: a, weight: 3}, b]") == [("a", 3.0), ("b", 1.0)]
        assert self.corpora(file, "{prefix: a, weight: 3}") == [("a", 3.0)]

    def test_held_out(self, file: Path) -> None:
        assert load(file).data.valid is None
        assert self.corpora(file, "v", "valid") == [("v", 1.0)]
        assert load(file, "data.valid=null").data.valid is None

    def test_mistakes(self, file: Path) -> None:
        assert "data.train.0.weight is 0" in refusal(file, "data.train=[{prefix: a, weight: 0}]")
        assert "data.train.1.wieght; did you mean weight?" in refusal(file, "data.train=[a, {prefix: b, wieght: 2}]")
        assert "data.train.0.prefix is required" in refusal(file, "data.train=[{weight: 2}]")
        assert "data.train is []" in refusal(file, "data.train=[]")


class TestMistakes:
    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("training.stepz=5", "unknown setting training.stepz; did you mean steps?"),
            ("trainin.seed=5", "unknown setting trainin; did you mean training?"),
            ("model.form=x", "unknown setting model.form; did you mean from?"),
            ("precision.zzzzzz=1", "known here: compute, initial_loss_scale, loss_scale_growth_interval"),
            ("training.steps=many", "training.steps is 'many': input should be a valid integer"),
            ("training.compile=most", "training.compile is 'most': input should be a valid boolean or 'all'"),
            ("training.steps=-1", "training.steps is -1: input should be greater than or equal to 0"),
            ("precision.compute=float8", "precision.compute is 'float8': input should be 'float32', 'bfloat16'"),
            ("data.mask_probability=0.6", "data.mask_probability is 0.6"),
        ],
    )
    def test_of_keys_and_values(self, file: Path, override: str, expected: str) -> None:
        text = refusal(file, override)
        assert text.startswith(f"{file}: ")
        assert expected in text

    def test_required(self, file: Path) -> None:
        file.write_text("tokenizer: {path: vocab.txt}\ndata: {train: corpus}\n", encoding="utf-8")
        assert "training is required and not set" in refusal(file)

    def test_empty_file(self, file: Path) -> None:
        file.write_text("", encoding="utf-8")
        assert "training is required" in refusal(file)

    def test_not_a_mapping(self, file: Path) -> None:
        file.write_text("- training\n- data\n", encoding="utf-8")
        assert "holds a list, not a mapping of sections" in refusal(file)

    def test_broken_yaml(self, file: Path) -> None:
        file.write_text("training: {steps: 5\ndata: x\n", encoding="utf-8")
        text = refusal(file)
        assert "is not valid YAML" in text
        assert "line 2" in text

    def test_not_utf8(self, file: Path) -> None:
        file.write_bytes(b"# caf\xe9\n")
        assert "is not text in UTF-8" in refusal(file)

    def test_not_a_file(self, tmp_path: Path) -> None:
        assert "cannot read the settings file" in refusal(tmp_path / "none.yaml")
        assert "cannot read the settings file" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["training:\n  steps: 1\n  steps: 2\n", "data: {}\nmodel: {}\ndata: {}\n"])
def test_a_key_that_is_set_twice(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    assert re.search(r"(steps|data) is set twice: remove one of the two .*line 3", refusal(tmp_path / "settings.yaml"))


def test_merged_keys_may_be_set_again(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("base: &base {steps: 1, seed: 3}\ntraining: {<<: *base, steps: 2}\n")
    assert read_tree(path, [])["training"] == {"steps": 2, "seed": 3}


def test_two_numbers_with_a_colon_are_text(tmp_path: Path) -> None:
    """YAML 1.1 would take them for one number to the base of 60."""
    path = tmp_path / "settings.yaml"
    path.write_text("logging: {profile: 10:12, every: 0x10}\nlearning_rate: {peak: 1.0e-4}\n", encoding="utf-8")
    assert read_tree(path, []) == {"logging": {"profile": "10:12", "every": 16}, "learning_rate": {"peak": 1e-4}}
    assert read_tree(path, ["logging.profile=1:3", "logging.every=3"])["logging"] == {"profile": "1:3", "every": 3}
