# SPDX-License-Identifier: Apache-2.0
"""Question answering: rows of one question, several files, and windows that leave out nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.data.tokenizers import Tokenizer
from parallel.errors import UserError

from .support import json_lines, letter_tokenizer, task_of, write
from .test_question_answering import ANSWERS, CONTEXT, NAME, question, squad


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return letter_tokenizer(tmp_path)


def flat(path: Path, form: str, rows: list[dict[str, Any]]) -> Path:
    """Rows of one question each, in one of the forms that files of them have."""
    if form == "lines":
        return json_lines(path.with_suffix(".jsonl"), rows)
    if form in ("array", "data"):
        return write(path.with_suffix(".json"), json.dumps(rows if form == "array" else {"data": rows}, indent=1))
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path.with_suffix(".csv")


def columns_of(answers: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [answer[key] for answer in answers] for key in ("text", "answer_start")}


@pytest.mark.parametrize("form", ["lines", "array", "data", "csv"])
def test_rows_of_one_question(tmp_path: Path, tokenizer: Tokenizer, form: str) -> None:
    """As the Hugging Face hub shows SQuAD."""
    qas = [question(f"q{number}", text) for number, text in enumerate(ANSWERS)]
    rows = [q | {"title": "t", "context": CONTEXT, "answers": columns_of(q["answers"])} for q in qas]
    expected = task_of(tokenizer, NAME, {"train": squad(tmp_path / "s.json", (CONTEXT, qas))}).examples("train")
    found = task_of(tokenizer, NAME, {"train": flat(tmp_path / "a", form, rows)}).examples("train")
    assert [(e.id, e.question, e.answers) for e in found] == [(e.id, e.question, e.answers) for e in expected]
    assert {e.article for e in found} == {"t"}
    renamed = [{"q": r["question"], "c": CONTEXT, "a": r["answers"], "name": f"n{k}"} for k, r in enumerate(rows)]
    columns = {"question": "q", "context": "c", "answers": "a", "id": "name"}
    data = {"train": flat(tmp_path / "b", form, renamed), "columns": columns}
    if form != "data":  # whose rows are known by their "context"
        found = task_of(tokenizer, NAME, data).examples("train")
        assert [(e.id, e.answers) for e in found] == [(f"n{k}", e.answers) for k, e in enumerate(expected)]


def test_rows_without_answers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        {"question": "q", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
        {"question": "q", "context": CONTEXT, "answers": columns_of(question("y", "mat")["answers"])},
    ]
    path = json_lines(tmp_path / "a.jsonl", rows)
    found = task_of(tokenizer, NAME | {"no_answer": True}, {"train": path}).examples("train")
    assert [(e.id, len(e.answers), e.labeled) for e in found] == [("0", 0, True), ("1", 1, True)]
    with pytest.raises(UserError, match=r"line 1: .* set task\.no_answer"):
        task_of(tokenizer, NAME, {"train": path}).examples("train")
    for unknown in ({}, {"answers": None}):
        path = json_lines(tmp_path / "t.jsonl", [{"question": "q", "context": CONTEXT} | unknown])
        task = task_of(tokenizer, NAME, {"test": path, "valid": path})
        assert [e.labeled for e in task.examples("test")] == [False]
        with pytest.raises(UserError, match=r"""['"]answers['"]"""):
            task.examples("valid")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"answers": {"text": ["cat"], "answer_start": [4, 5]}}, 'have not as many "text" as "answer_start"'),
        ({"answers": {"text": ["cat"]}}, 'no "answer_start"'),
        ({"answers": {"text": ["cat"], "answer_start": [5]}}, "at character 4, not at 5"),
        ({"answers": "cat"}, "are not a list, nor an object"),
        ({"answers": "{'text': array(['cat'])}"}, "neither JSON nor a Python list"),
        ({"question": 3}, '"question" is not text'),
    ],
)
def test_bad_rows(tmp_path: Path, tokenizer: Tokenizer, row: dict, reason: str) -> None:
    good = {"question": "q", "context": CONTEXT, "answers": columns_of(question("y", "mat")["answers"])}
    path = json_lines(tmp_path / "a.jsonl", [good, good | row])
    with pytest.raises(UserError, match=rf"a\.jsonl line 2: .*{reason}"):
        task_of(tokenizer, NAME, {"train": path}).examples("train")
    path = json_lines(tmp_path / "b.jsonl", [{"q": "x", "context": CONTEXT}])
    with pytest.raises(UserError, match=r"no row of .* column 'question' .*data\.columns \(question, context"):
        task_of(tokenizer, NAME, {"train": path, "on_bad_row": "skip"}).examples("train")


def test_several_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Articles of different files are different ones, and ids are unique over all of them."""
    files = [squad(tmp_path / f"{name}.json", (CONTEXT, [question(name, "cat")])) for name in "ab"]
    examples = task_of(tokenizer, NAME, {"train": files}).examples("train")
    assert [(e.id, e.article) for e in examples] == [("a", "0"), ("b", "1")]
    with pytest.raises(UserError, match=r"b\.json .*\(id b\): .*that of an earlier question"):
        task_of(tokenizer, NAME, {"train": [*files, files[1]]}).examples("train")
    with pytest.raises(UserError, match=r"data\.columns is for rows, but .*a\.json holds SQuAD's articles"):
        task_of(tokenizer, NAME, {"train": files, "columns": {"context": "c"}}).examples("train")


def test_windows_leave_out_no_text(tokenizer: Tokenizer) -> None:
    settings = NAME | {"max_length": 24, "max_query_length": 8}
    assert task_of(tokenizer, settings).doc_stride == 13  # of 24, for a question of 8 and 3 special tokens
    assert task_of(tokenizer, settings | {"doc_stride": 13}).doc_stride == 13
    with pytest.raises(
        UserError, match=r"task\.doc_stride 14 would leave out text.*room for 13 .*set it to 13 or less"
    ):
        task_of(tokenizer, settings | {"doc_stride": 14})
