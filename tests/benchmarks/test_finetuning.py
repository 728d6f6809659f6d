# SPDX-License-Identifier: Apache-2.0
"""The benchmark of fine-tuning: constant answers of every kind of task, and what is run for a seed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import finetuning as benchmark
from tests.megatron_bert.finetuning.support import make_encoder
from tests.megatron_bert.tasks.support import json_lines, letter_tokenizer, task_of, write


def _constant(folder: Path, settings: dict[str, Any], rows: dict[str, list[Any]], **data: Any) -> dict[str, float]:
    files = {split: json_lines(folder / f"{split}.jsonl", examples) for split, examples in rows.items()}
    task = task_of(letter_tokenizer(folder), settings, {**files, **data})
    return {split: benchmark.constant_answer(task, split) for split in rows}


def test_the_most_frequent_class(tmp_path: Path) -> None:
    rows = {
        "train": [{"text": "the cat", "label": label} for label in "abbbc"],
        "valid": [{"text": "the mat", "label": label} for label in "abca"],
    }
    assert _constant(tmp_path, {"name": "classification"}, rows) == {"train": 0.6, "valid": 0.25}


def test_labels_that_most_rows_have(tmp_path: Path) -> None:
    rows = {
        "train": [{"text": "the cat", "label": labels} for labels in (["a"], ["a", "b"], ["a", "c"])],
        "valid": [{"text": "the mat", "label": labels} for labels in (["a"], ["a", "b"], ["c"], ["a"])],
    }
    settings = {"name": "classification", "multi_label": True, "metric": "accuracy"}
    found = _constant(tmp_path, settings, rows)
    assert found["valid"] == 0.5


def test_the_mean_of_a_number(tmp_path: Path) -> None:
    rows = {
        "train": [{"text": "the cat", "label": value} for value in (1.0, 2.0, 6.0)],
        "valid": [{"text": "the mat", "label": value} for value in (1.0, 5.0)],
    }
    assert _constant(tmp_path, {"name": "regression", "metric": "pearson"}, rows) == {"train": 0.0, "valid": 0.0}


def test_the_most_frequent_place_of_a_choice(tmp_path: Path) -> None:
    def rows(answers: str) -> list[Any]:
        return [
            {
                "id": f"{number}",
                "question": {
                    "stem": "the cat",
                    "choices": [{"label": letter, "text": letter} for letter in "ABC"],
                },
                "answerKey": answer,
            }
            for number, answer in enumerate(answers)
        ]

    settings = {"name": "multiple_choice"}
    found = _constant(tmp_path, settings, {"train": rows("ACCB"), "valid": rows("CCA")}, format="arc")
    assert found == {"train": 0.5, "valid": pytest.approx(2 / 3)}


def test_no_entities(tmp_path: Path) -> None:
    file = write(tmp_path / "train.conll", "the O\ncat B-animal\nsat O\n\nmat O\n")
    task = task_of(letter_tokenizer(tmp_path), {"name": "token_classification"}, {"train": file})
    assert benchmark.constant_answer(task, "train") == 0.0


def test_the_first_words_of_a_text(tmp_path: Path) -> None:
    """As many as suit the training questions best, which need not be best for the others."""

    def squad(name: str, answer: str) -> Path:
        context = "one two three four five six seven eight"
        question = {"id": "q", "question": "what", "answers": [{"text": answer, "answer_start": context.index(answer)}]}
        content = {"data": [{"paragraphs": [{"context": context, "qas": [question]}]}]}
        return write(tmp_path / name, json.dumps(content))

    files = {"train": squad("train.json", "one two three"), "valid": squad("valid.json", "two")}
    task = task_of(letter_tokenizer(tmp_path), {"name": "question_answering"}, files)
    assert benchmark.constant_answer(task, "train") == pytest.approx(100.0)
    assert benchmark.constant_answer(task, "valid") == pytest.approx(50.0)  # 1 of 3 words, all of 1


def test_runs_of_a_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path)
    rows = [{"text": "w1 w2", "label": label} for label in "aab"]
    file = tmp_path / "words.yaml"
    settings = {
        "model": {"from": str(encoder)},
        "task": {"name": "classification", "max_length": 16},
        "data": {
            "train": str(json_lines(tmp_path / "a.jsonl", rows)),
            "valid": str(json_lines(tmp_path / "b.jsonl", rows)),
        },
        "training": {"run_dir": "unused", "steps": 1, "global_batch_size": 2, "micro_batch_size": 2},
    }
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    asked: list[Any] = []

    def finished_run(run: Any, kind: Any, file: Path, directory: Path, changes: list[str]) -> dict[str, Any]:
        asked.append((directory.relative_to(tmp_path), changes[0]))
        return {"splits": {"valid": {"accuracy": len(asked) / 10, "loss": 1.0}}}

    monkeypatch.setattr(benchmark, "finished_run", finished_run)
    theirs = tmp_path / "runs" / "words" / "seed_2" / "transformers.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_text('{"scores": {"valid": {"accuracy": 0.75}}, "training_seconds": 1}')
    arguments = argparse.Namespace(runs=tmp_path / "runs", seeds=[1, 2, 5], their_seeds=[2], finished=False)
    found = benchmark.measure(file, arguments)
    assert asked == [(Path("runs/words") / f"seed_{seed}" / "float", f"training.seed={seed}") for seed in (1, 2, 5)]
    assert found["metric"] == "accuracy"
    (theirs.parent / "float").mkdir()
    (theirs.parent / "float" / "results.json").write_text("{}", encoding="utf-8")
    only = benchmark.measure(file, argparse.Namespace(runs=tmp_path / "runs", seeds=[1, 2, 5], finished=True))
    assert only["splits"]["valid"]["megatron_bert"]["seeds"] == [0.4]
    assert only["splits"]["valid"]["transformers"]["seeds"] == [0.75]
    assert found["splits"] == {
        "valid": {
            "megatron_bert": {"seeds": [0.1, 0.2, 0.3], "median": 0.2},
            "constant answer": {"seeds": [pytest.approx(2 / 3)], "median": pytest.approx(2 / 3)},
            "transformers": {"seeds": [0.75], "median": 0.75},
        }
    }
