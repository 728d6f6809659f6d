# SPDX-License-Identifier: Apache-2.0
"""Questions made from text: their words and answers stand in the passage, and the task reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parallel.errors import UserError
from tests.megatron_bert.tasks.support import letter_tokenizer, task_of, write
from tools.cloze_questions import main, questions

TEXTS = ["The cat, who sat on the mat; it was fat. " * 4, "", "a lone word stood here among some others, and so on"]


def test_answers_stand_where_they_are_said_to(tmp_path: Path) -> None:
    found = list(questions(TEXTS, 300, (5, 20)))
    assert len(found) > 200
    assert len({paragraph["context"] for paragraph in found}) > 20
    for paragraph in found:
        (asked,) = paragraph["qas"]
        (answer,) = asked["answers"]
        begin = answer["answer_start"]
        assert paragraph["context"][begin : begin + len(answer["text"])] == answer["text"] != ""
        words = asked["question"].removesuffix("?").split()
        assert words.count("what") == 1
        assert set(words) - {"what"} <= set(paragraph["context"].split())
        assert paragraph["context"] in TEXTS[0] or paragraph["context"] in TEXTS[2]
    assert found == list(questions(TEXTS, 300, (5, 20)))
    assert found != list(questions(TEXTS, 300, (5, 20), seed=1))

    data = {"version": "1.1", "data": [{"title": "", "paragraphs": found}]}
    file = write(tmp_path / "cloze.json", json.dumps(data))
    task = task_of(letter_tokenizer(tmp_path), {"name": "question_answering"}, {"train": file})
    assert len(task.examples("train")) == len(found)


@pytest.mark.parametrize(
    ("texts", "words", "message"),
    [
        ([" ", ""], (5, 20), "the input holds no words"),
        (TEXTS, (9, 8), "--words is 9 8"),
        (TEXTS, (1, 8), "--words is 1 8"),
    ],
)
def test_what_makes_no_questions(texts: list[str], words: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(questions(texts, 3, words))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = write(tmp_path / "text.txt", TEXTS[0]), tmp_path / "cloze.json"
    assert main([str(source), str(target), "--questions", "5", "--words", "5", "9"]) == 0
    (title,) = json.loads(target.read_text(encoding="utf-8"))["data"]
    assert f"{target}: {len(title['paragraphs'])} questions" in capsys.readouterr().out
    for arguments, message in (
        ([str(tmp_path / "none.txt"), str(target)], "none.txt does not exist"),
        ([str(source), str(target), "--questions", "0"], "--questions is 0: give 1 or more"),
        (
            [str(source), str(tmp_path / "no" / "cloze.json")],
            "cloze.json cannot be written (No such file or directory)",
        ),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "cloze.json"}
