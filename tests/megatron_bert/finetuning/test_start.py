# SPDX-License-Identifier: Apache-2.0
"""What a run takes from a fine-tuned model: its head in the order of the task's classes, and its vocabulary."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bert.convert.run_models import finished_model, read_results
from megatron_bert.finetuning.finetune import finetune
from megatron_bert.finetuning.start import find_tokenizer
from megatron_bert.finetuning.weights import load_finetuned
from megatron_bert.model.finetuning import BertForTask
from parallel.errors import UserError
from parallel.whole_files import write_json
from tests.megatron_bert.finetuning.support import CONFIG, make_run, run_settings


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    finetune(make_run(folder, training__steps=4))
    return folder


def stage(kind: str = "sequence", **changes: Any) -> BertForTask:
    """A stage for a task with the classes a, b and c."""
    fields = {"id2label": dict(enumerate("abc")), "problem_type": "single_label_classification"} | changes
    config = replace(CONFIG, **fields)
    return BertForTask(config, kind, config.num_labels)


def changed(trained: Path, target: Path, **values: Any) -> Path:
    """A copy of the model with another config.json."""
    shutil.copytree(trained / "run" / "model", target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | values), encoding="utf-8")
    return target


class TestHead:
    def test_scores_are_the_same_in_another_order(self, trained: Path) -> None:
        before = read_results(trained / "run")
        settings = run_settings(
            trained,
            model={"from": trained / "run", "keep_head": True},
            task__labels=["c", "a", "b"],
            training__steps=1,
            training__run_dir=trained / "reordered",
            learning_rate__peak=1e-12,
        )
        finetune(settings)
        after = read_results(trained / "reordered")
        assert before is not None
        assert after is not None
        assert after["splits"]["valid"] == pytest.approx(before["splits"]["valid"], rel=1e-4)

    def test_rows_follow_their_names(self, trained: Path) -> None:
        ours, theirs = stage(id2label=dict(enumerate("cab"))), stage()
        load_finetuned(ours, trained / "run")
        load_finetuned(theirs, trained / "run" / "model")
        for mine, other in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            expected = other[1][[2, 0, 1]] if mine[0].startswith("classifier.") else other[1]
            assert torch.equal(mine[1], expected), mine[0]
        assert len(set(theirs.get_parameter("classifier.weight")[:, 0].tolist())) == 3

    def test_names_that_nobody_gave_say_nothing(self, trained: Path, tmp_path: Path) -> None:
        unnamed = {str(number): f"LABEL_{number}" for number in range(3)}
        source = changed(trained, tmp_path / "model", id2label=unnamed, label2id=None)
        ours, theirs = stage(), stage()
        load_finetuned(ours, source)
        load_finetuned(theirs, trained / "run")
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, other)

    def test_names_in_another_case_are_the_same(self, trained: Path, tmp_path: Path) -> None:
        ours, theirs = stage(), stage()
        load_finetuned(ours, changed(trained, tmp_path / "model", id2label={"0": "C", "1": "A", "2": "B"}))
        load_finetuned(theirs, trained / "run")
        for kind in ("weight", "bias"):
            mine, other = (model.get_parameter(f"classifier.{kind}") for model in (ours, theirs))
            assert torch.equal(mine, other[[1, 2, 0]])
        with pytest.raises(UserError, match="was fine-tuned for the classes a, A, b"):
            load_finetuned(stage(), changed(trained, tmp_path / "both", id2label={"0": "a", "1": "A", "2": "b"}))

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"id2label": dict(enumerate("abd"))}, "for the classes a, b, c, but the task has a, b, d"),
            ({"id2label": dict(enumerate("ab"))}, "but the task has a, b"),
            ({"problem_type": "multi_label_classification"}, "for single_label_classification, but the task is multi"),
            ({"id2label": {0: "LABEL_0"}, "problem_type": "regression"}, "but the task is regression"),
            ({"vocab_size": 90}, "the checkpoint has 95 words, but the tokenizer has 90"),
        ],
    )
    def test_another_task(self, trained: Path, changes: dict[str, Any], expected: str) -> None:
        with pytest.raises(UserError, match=expected):
            load_finetuned(stage(**changes), trained / "run")

    def test_damaged_names(self, trained: Path, tmp_path: Path) -> None:
        source = changed(trained, tmp_path / "model", id2label={"first": "a"})
        with pytest.raises(UserError, match=r"id2label in .* is damaged"):
            load_finetuned(stage(), source)


class TestTokenizer:
    def test_a_damaged_one_is_named(self, tmp_path: Path) -> None:
        settings = make_run(tmp_path)
        (tmp_path / "encoder" / "tokenizer.json").write_text("{", encoding="utf-8")
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            find_tokenizer(settings)

    def test_none(self, tmp_path: Path) -> None:
        settings = make_run(tmp_path)
        for name in ("vocab.txt", "tokenizer.json"):
            (tmp_path / "encoder" / name).unlink()
        with pytest.raises(UserError, match="holds no vocabulary"):
            find_tokenizer(settings)


class TestSeveralRuns:
    """A directory of several seeds stands for its best one."""

    def runs(self, trained: Path, folder: Path, **summary: Any) -> Path:
        shutil.copytree(trained / "run" / "model", folder / "seed_2" / "model")
        write_json(folder / "results.json", {"runs": {"seed_1": {}, "seed_2": {}}} | summary)
        return folder

    def test_a_run_starts_from_the_best(self, trained: Path, tmp_path: Path) -> None:
        folder = self.runs(trained, tmp_path / "runs", best={"name": "seed_2", "score": 0.5})
        assert finished_model(folder) == folder / "seed_2" / "model"
        settings = run_settings(
            trained,
            model={"from": folder, "keep_head": True},
            training__steps=1,
            training__run_dir=tmp_path / "again",
            learning_rate__peak=1e-12,
        )
        finetune(settings)
        before, after = read_results(trained / "run"), read_results(tmp_path / "again")
        assert before is not None
        assert after is not None
        assert after["splits"]["valid"] == pytest.approx(before["splits"]["valid"], rel=1e-4)

    def test_no_best_one(self, trained: Path, tmp_path: Path) -> None:
        folder = self.runs(trained, tmp_path / "runs", best=None)
        with pytest.raises(UserError, match="no best one: give one of seed_1, seed_2"):
            finetune(run_settings(trained, model={"from": folder}, training__run_dir=tmp_path / "again"))

    def test_a_damaged_summary(self, trained: Path, tmp_path: Path) -> None:
        folder = self.runs(trained, tmp_path / "runs", best="seed_2")
        with pytest.raises(UserError, match=r"results\.json is damaged"):
            finished_model(folder)

    def test_results_of_others_beside_a_model_are_not_read(self, trained: Path, tmp_path: Path) -> None:
        shutil.copytree(trained / "run" / "model", tmp_path / "model")
        (tmp_path / "model" / "results.json").write_text("no JSON", encoding="utf-8")
        assert finished_model(tmp_path / "model") == tmp_path / "model"
        assert finished_model(tmp_path) == tmp_path / "model"


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    settings = make_run(tmp_path)
    missing = settings.model.model_copy(update={"from_": tmp_path / "nowhere"})
    with pytest.raises(UserError, match=r"model\.from is .*nowhere, which is not there"):
        finetune(settings.model_copy(update={"model": missing}))
    assert not settings.training.run_dir.exists()
