# SPDX-License-Identifier: Apache-2.0
"""Settings of tasks: names, defaults, and no setting that means nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_bert.config_file import apply_override
from megatron_bert.model.task_heads.table import HEADS
from megatron_bert.tables import found_at
from megatron_bert.tasks.registry import build_task
from megatron_bert.tasks.settings import TaskDataSettings, TaskSettings
from megatron_bert.tasks.table import TASKS
from megatron_bert.tasks.task import Task
from parallel.errors import UserError

from .support import letter_tokenizer


def test_official_spellings_are_names() -> None:
    names = ["CoLA", "SST-2", "MRPC", "QQP", "STS-B", "MNLI", "QNLI", "RTE", "WNLI"]
    found = [TaskSettings(name=name).name for name in names]
    assert found == ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
    with pytest.raises(ValidationError, match='"squad" is unknown: choose cola'):
        TaskSettings(name="squad")


def test_every_name_has_a_task() -> None:
    assert all(issubclass(found_at(kind.place), Task) and kind.head in HEADS for kind in TASKS.values())


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("sst2", {"labels": ["a", "b"]}),
        ("regression", {"multi_label": True}),
        ("classification", {"label_threshold": 0.3}),
        ("classification", {"doc_stride": 5}),
        ("classification", {"scheme": "IO"}),
        ("token_classification", {"n_best": 3}),
        ("token_classification", {"answer_by": "expected_f1"}),
        ("token_classification", {"max_query_length": 3}),
        ("multiple_choice", {"max_answer_length": 3}),
        ("question_answering", {"null_threshold": 1.0}),
        ("mnli", {"no_answer": True}),
        ("classification", {"labels": ["a", "a"]}),
        ("classification", {"max_length": 4}),
    ],
)
def test_settings_that_mean_nothing_are_refused(name: str, setting: dict) -> None:
    with pytest.raises(ValidationError):
        TaskSettings(name=name, **setting)


def test_a_resolved_file_is_read_again() -> None:
    for name in TASKS:
        settings = TaskSettings(name=name)
        assert TaskSettings.model_validate(settings.model_dump(mode="json")) == settings
    data = TaskDataSettings(train=[Path("a"), Path("b")], test=Path("c"), columns={"text": 3, "label": ["x", "y"]})
    assert TaskDataSettings.model_validate(data.model_dump(mode="json")) == data


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("[0,1,2]", ["0", "1", "2"]),
        ("[yes, no]", ["yes", "no"]),
        ("[NO, SE, on]", ["NO", "SE", "on"]),
        ("[true, False]", ["true", "false"]),
        ("['1.0', 'null']", ["1.0", "null"]),
    ],
)
def test_labels_as_yaml_types_them(given: str, expected: list[str]) -> None:
    tree: dict = {}
    apply_override(tree, f"task.labels={given}")
    assert TaskSettings(name="classification", **tree["task"]).labels == expected


@pytest.mark.parametrize("given", ["[1.0, 0.0]", "[null, a]", "[2020-01-01]"])
def test_labels_that_yaml_does_not_read_as_text(given: str) -> None:
    tree: dict = {}
    apply_override(tree, f"task.labels={given}")
    with pytest.raises(ValidationError, match="does not read as text: quote each label"):
        TaskSettings(name="classification", **tree["task"])


@pytest.mark.parametrize(
    "data",
    [
        {"valid": "a", "valid_fraction": 0.1},
        {"test": "a", "test_fraction": 0.1},
        {"valid_fraction": 0.5, "test_fraction": 0.5},
        {"directory": "a", "train": "b"},
        {"label_separator": ""},
        {"unknown": 1},
        {"train": []},
    ],
)
def test_contradictions_in_data(data: dict) -> None:
    with pytest.raises(ValidationError):
        TaskDataSettings(**data)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("classification", {"directory": "."}),
        ("question_answering", {"directory": "."}),
        ("sst2", {"columns": {"text": "x"}}),
        ("sst2", {"header": False}),
        ("question_answering", {"header": False}),
        ("question_answering", {"format": "jsonl"}),
        ("token_classification", {"label_separator": ";"}),
    ],
)
def test_data_settings_that_mean_nothing_to_the_task(tmp_path: Path, name: str, data: dict) -> None:
    field = next(iter(data))
    with pytest.raises(UserError, match=f'data.{field} means nothing to the task "{name}"'):
        build_task(TaskSettings(name=name), TaskDataSettings(**data), letter_tokenizer(tmp_path))


def test_missing_files_are_told_before_any_work(tmp_path: Path) -> None:
    data = TaskDataSettings(train=tmp_path / "a.tsv")
    with pytest.raises(UserError, match=r"data\.train is .*a\.tsv, which does not exist"):
        build_task(TaskSettings(name="sst2"), data, letter_tokenizer(tmp_path))
