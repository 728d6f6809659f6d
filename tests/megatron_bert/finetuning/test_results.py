# SPDX-License-Identifier: Apache-2.0
"""What a run writes is what it scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bert.finetuning.finetune import finetune
from megatron_bert.finetuning.objective import SplitResult
from megatron_bert.finetuning.results import read_results, settled
from megatron_bert.tasks.classification import ClassificationTask
from tests.megatron_bert.finetuning.support import make_run, write_classes


def test_each_split_is_predicted_once_and_written_as_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_run(tmp_path, training__steps=2, data__test=tmp_path / "test.jsonl")
    write_classes(tmp_path / "test.jsonl", 30, 3)
    sizes = []
    original = ClassificationTask.predictions

    def predictions(self: ClassificationTask, examples: Any, *rest: Any) -> Any:
        sizes.append(len(examples))
        return original(self, examples, *rest)

    monkeypatch.setattr(ClassificationTask, "predictions", predictions)
    finetune(settings)
    assert sizes == [40, 40, 30]  # the evaluation of the last step, then every split by the best checkpoint
    results = read_results(tmp_path / "run")
    assert results is not None
    for split in ("valid", "test"):
        rows = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").open(encoding="utf-8")]
        found = [json.loads(line) for line in (tmp_path / "run" / f"predictions_{split}.jsonl").open(encoding="utf-8")]
        assert [(f["id"], f["text"], f["gold_label"]) for f in found] == [
            (r["id"], r["text"], r["label"]) for r in rows
        ]
        right = [row["label"] == answer["label"] for row, answer in zip(rows, found, strict=True)]
        assert results["splits"][split]["accuracy"] == pytest.approx(sum(right) / len(right))
        assert next(iter(results["splits"][split])) == "loss"


def test_class_weights_are_in_the_results(tmp_path: Path) -> None:
    task = {"name": "classification", "max_length": 16, "class_weights": "balanced"}
    finetune(make_run(tmp_path, training__steps=1, task=task))
    labels = [json.loads(line)["label"] for line in (tmp_path / "train.jsonl").open(encoding="utf-8")]
    results = read_results(tmp_path / "run")
    assert results is not None
    expected = {name: len(labels) / (3 * labels.count(name)) for name in "abc"}
    assert results["class_weights"] == pytest.approx(expected)


class Above:
    """A task that says whether a logit is above a threshold, which it can choose."""

    def __init__(self, threshold: float, best: float) -> None:
        self.threshold, self.best = threshold, best

    def calibrated(self, examples: list[bool], predictions: list[dict[str, Any]]) -> Above:
        assert len(predictions) == len(examples)
        return self if self.threshold == self.best else Above(self.best, self.best)

    def predictions(self, examples: list[bool], instances: Any, logits: list[np.ndarray]) -> list[dict[str, Any]]:
        return [{"label": bool(values[0] > self.threshold)} for values in logits]

    def metrics(self, examples: list[bool], predictions: list[dict[str, Any]]) -> dict[str, float]:
        return {"accuracy": float(np.mean([p["label"] == e for p, e in zip(predictions, examples, strict=True)]))}


def result(task: Above, examples: list[bool], values: list[float]) -> SplitResult:
    logits = [np.array([value]) for value in values]
    predictions = task.predictions(examples, [], logits)
    return SplitResult(examples, [], logits, predictions, {"loss": 0.25} | task.metrics(examples, predictions))


def test_what_is_chosen_on_validation_data_holds_for_every_split() -> None:
    task: Any = Above(0.0, best=2.0)
    splits = {"valid": result(task, [False, True], [1.0, 3.0]), "test": result(task, [False, False], [1.0, 1.5])}
    assert [found.scores["accuracy"] for found in splits.values()] == [0.5, 0.0]
    chosen: Any
    chosen, found = settled(task, splits)
    assert chosen.threshold == 2.0
    for split in splits:
        assert found[split].scores == {"loss": 0.25, "accuracy": 1.0}
        assert [p["label"] for p in found[split].predictions] == splits[split].examples


@pytest.mark.parametrize("split", ["valid", "test"])
def test_nothing_to_choose(split: str) -> None:
    """Because it is chosen, or because there is no validation data."""
    task: Any = Above(2.0, best=2.0 if split == "valid" else 0.0)
    splits = {split: result(task, [False, True], [1.0, 3.0])}
    chosen, found = settled(task, splits)
    assert chosen is task
    assert found[split].predictions is splits[split].predictions
