# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning at any layout is the fine-tuning of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bert.finetuning.finetune import finetune
from megatron_bert.finetuning.results import read_results
from tests.megatron_bert.finetuning.support import (
    join_world,
    make_encoder,
    run_settings,
    write_answers,
    write_classes,
    write_entities,
    write_questions,
)
from tests.megatron_bert.training.runs import rows
from tests.worlds import Together, run_world

#: Sums in another order, in float32, carried through a few steps of an optimizer with a large eps.
CLOSE = 2e-5
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel__tensor": 2},
    "sequence": {"parallel__tensor": 2, "parallel__sequence": True, "training__micro_batch_size": 16},
    "pipeline": {"parallel__pipeline": 2, "training__micro_batch_size": 4},
    "interleaved": {
        "parallel__pipeline": 2,
        "parallel__schedule": "interleaved-1f1b",
        "training__recompute": "full",
    },
    "zero_bubble": {"parallel__pipeline": 2, "parallel__schedule": "zero-bubble-h1"},
    "data": {"training__micro_batch_size": 4},
    "sharded": {"parallel__sharding": "full"},
}
TASKS: dict[str, dict[str, Any]] = {
    "classification": {},
    "multiple_choice": {
        "task": {"name": "multiple_choice", "max_length": 24},
        "data": {"train": "questions.jsonl", "valid": "questions.jsonl", "format": "arc"},
    },
    "question_answering": {
        "task": {"name": "question_answering", "max_length": 12, "doc_stride": 4},
        "data": {"train": "answers.json", "valid": "answers.json"},
    },
    "token_classification": {
        "task": {"name": "token_classification", "max_length": 12, "doc_stride": 3, "class_weights": "balanced"},
        "data": {"train": "entities.conll", "valid": "entities.conll"},
    },
}
#: What does not differ from one family to another.
ALSO: dict[str, dict[str, Any]] = {
    "weighted": {"task": {"name": "classification", "max_length": 16, "class_weights": {"a": 0.01, "b": 4, "c": 0.5}}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetuning")
    make_encoder(folder)
    write_classes(folder / "train.jsonl", 40, 1)
    write_classes(folder / "valid.jsonl", 20, 2)
    write_questions(folder / "questions.jsonl", 24, 3)
    write_answers(folder / "answers.json", 24, 4)
    write_entities(folder / "entities.conll", 24, 5)
    return folder


def run(folder: Path, run_dir: Path, task: str, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Losses of every step and the scores after the last; the same on every rank."""
    settings = run_settings(
        folder,
        optimizer__eps=1e-3,
        training__steps=3,
        training__evaluate_every=2,
        training__evaluate_batch_size=12,
        training__run_dir=run_dir,
        **changes,
    ).model_dump(by_alias=True)
    for section, values in (TASKS | ALSO)[task].items():
        given = {k: folder / v if k in ("train", "valid") else v for k, v in values.items()}
        settings[section] = given if section == "data" else values
    finetune(type(run_settings(folder)).model_validate(settings))
    return rows(run_dir)


def run_layouts(folder: Path, out: Path, task: str, names: tuple[str, ...]) -> None:
    """On every rank of two."""
    join_world()
    for name in names:
        run(folder, out / task / name, task, LAYOUTS[name])


def _go_on(folder: Path, run_dir: Path, changes: dict[str, Any]) -> None:
    join_world()
    run(folder, run_dir, "classification", changes)


def compare(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(actual) == len(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=CLOSE, abs=1e-6), (mine["step"], name)


#: Which layouts are compared, by task.
CHOSEN = {
    task: tuple(LAYOUTS) if task == "classification" else ("sequence", "interleaved", "sharded")
    for task in (*TASKS, *ALSO)
}


class LayoutRuns:
    """Runs of tasks at layouts of two ranks, all in one world.

    Args:
        folder: of the model and the files.
        out: for the directories of the runs.
        chosen: layouts by task.
    """

    def __init__(self, folder: Path, out: Path, chosen: dict[str, tuple[str, ...]]) -> None:
        self.out = out
        self.calls = {task: (2, run_layouts, folder, out, task, names) for task, names in chosen.items()}
        self.worlds = Together(*self.calls.values())

    def __call__(self, task: str) -> Path:
        """The folder that has the directories of a task's runs, by layout."""
        self.worlds(*self.calls[task])
        return self.out / task


@pytest.fixture(scope="module")
def layouts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LayoutRuns:
    return LayoutRuns(folder, tmp_path_factory.mktemp("layouts"), CHOSEN)


@pytest.mark.parametrize("task", CHOSEN)
def test_every_layout_gives_the_curve_of_one_process(
    folder: Path, layouts: LayoutRuns, tmp_path: Path, task: str
) -> None:
    expected = run(folder, tmp_path / "one", task, {})
    assert [row["step"] for row in expected if "loss" in row] == [1, 2, 3]
    assert [row["step"] for row in expected if "valid_loss" in row] == [2, 3]
    for name in CHOSEN[task]:
        compare(rows(layouts(task) / name), expected)


def test_a_run_goes_on_at_another_layout(folder: Path, tmp_path: Path) -> None:
    """And what it leaves behind is the same."""
    expected = run(folder, tmp_path / "one", "classification", {"learning_rate__layer_decay": 0.8})
    half = {"learning_rate__layer_decay": 0.8, "checkpoint__every": 2, "checkpoint__keep": 0}
    run(folder, tmp_path / "two", "classification", half)
    run_dir = tmp_path / "two"
    (run_dir / "results.json").unlink()
    (run_dir / "checkpoints" / "step_00000003").rename(tmp_path / "last")
    half |= {"parallel__tensor": 2, "parallel__sequence": True}
    run_world(2, _go_on, folder, run_dir, half)
    compare(rows(run_dir), expected)
    found, wanted = read_results(run_dir), read_results(tmp_path / "one")
    assert found is not None
    assert wanted is not None
    assert found["best_step"] == wanted["best_step"]
    mine, theirs = _weights(run_dir), _weights(tmp_path / "one")
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-4, atol=1e-6, msg=name)


def _weights(run_dir: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run_dir / "model" / "model.safetensors")
