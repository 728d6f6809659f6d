# SPDX-License-Identifier: Apache-2.0
"""What stands beside a prediction in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.megatron_bert.tasks.support import json_lines, letter_tokenizer, task_of, write

TABLE = {"name": "classification"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[Any], list[dict[str, Any]]]] = {
    "single": (
        TABLE | {"labels": ["no", "yes"]},
        {"columns": {"text_pair": "other"}},
        [{"text": "a", "other": "b", "label": "yes"}, {"text": "c", "other": "d"}],
        [{"text": "a", "text_pair": "b", "gold_label": "yes"}, {"text": "c", "text_pair": "d"}],
    ),
    "multi": (
        TABLE | {"labels": ["x", "y", "z"], "multi_label": True},
        {},
        [{"text": "a", "label": ["z", "x"]}, {"text": "b", "label": []}, {"text": "c"}],
        [{"text": "a", "gold_labels": ["x", "z"]}, {"text": "b", "gold_labels": []}, {"text": "c"}],
    ),
    "regression": (
        {"name": "regression"},
        {},
        [{"text": "a", "label": 2.5}, {"text": "b"}],
        [{"text": "a", "gold_value": 2.5}, {"text": "b"}],
    ),
    "choice": (
        {"name": "multiple_choice"},
        {"format": "jsonl"},
        [
            {"question": "q", "choices": ["a", "b"], "label": 1},
            {"question": "r", "context": "p", "choices": ["a", "b"]},
        ],
        [
            {"question": "q", "choices": ["a", "b"], "gold_label": 1},
            {"question": "r", "choices": ["a", "b"], "context": "p"},
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_of_json_lines(case: str, tmp_path: Path) -> None:
    settings, data, rows, expected = CASES[case]
    task = task_of(letter_tokenizer(tmp_path), settings, data | {"test": json_lines(tmp_path / "test.jsonl", rows)})
    found = [task.shown(example) for example in task.examples("test")]
    assert found == expected
    # Without the right answer it is a row of a stream.
    for row in found:
        asked = {key: value for key, value in row.items() if not key.startswith("gold_")}
        assert task.shown(task.example_from(asked, "here")) == asked


def test_tags(tmp_path: Path) -> None:
    path = write(tmp_path / "test.txt", "the\tO\ncat\tB-X\n\n")
    task = task_of(
        letter_tokenizer(tmp_path), {"name": "token_classification", "labels": ["O", "B-X", "I-X"]}, {"test": path}
    )
    assert task.shown(task.examples("test")[0]) == {"gold_tags": ["O", "B-X"]}
    assert task.shown(task.example_from({"text": "the cat"}, "here")) == {}


@pytest.mark.parametrize("answers", [["cat"], []])
def test_answers(answers: list[str], tmp_path: Path) -> None:
    found = [{"text": text, "answer_start": 4} for text in answers]
    question = {"id": "1", "question": "who", "answers": found, "is_impossible": not answers}
    data = {"data": [{"title": "t", "paragraphs": [{"context": "the cat", "qas": [question]}]}]}
    task = task_of(
        letter_tokenizer(tmp_path),
        {"name": "question_answering", "no_answer": True},
        {"test": json_lines(tmp_path / "test.json", [data])},
    )
    assert task.shown(task.examples("test")[0]) == {"question": "who", "context": "the cat", "gold_answers": answers}
    assert "gold_answers" not in task.shown(task.example_from({"question": "who", "context": "the cat"}, "here"))
