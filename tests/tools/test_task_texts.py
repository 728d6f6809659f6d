# SPDX-License-Identifier: Apache-2.0
"""Texts of a task's training examples: what each kind of example says, and nothing of what is held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.megatron_bert.finetuning.support import make_encoder
from tests.megatron_bert.tasks.support import json_lines, letter_tokenizer, task_of, write
from tools.task_texts import main, training_texts


def _texts(folder: Path, settings: dict[str, Any], **data: Any) -> list[str]:
    return training_texts([task_of(letter_tokenizer(folder), settings, data)])


def test_texts_and_pairs(tmp_path: Path) -> None:
    rows = [("the  cat\n sat", " "), ("a", "b"), ("the cat sat", ""), ("held", "c"), ("held out", "d")]
    train = json_lines(
        tmp_path / "t.jsonl", [{"text": a, "text_pair": b, "label": n % 2} for n, (a, b) in enumerate(rows)]
    )
    valid = json_lines(tmp_path / "v.jsonl", [{"text": "held", "text_pair": "b", "label": 1}])
    columns = {"text_pair": "text_pair"}
    found = _texts(tmp_path, {"name": "classification"}, train=train, valid=valid, columns=columns)
    assert found == ["the cat sat", "a\nb", "held out\nd"]


def test_questions_with_their_right_choice(tmp_path: Path) -> None:
    train = write(tmp_path / "t.csv", "who sat?,cat,mat,a,b,A\nwhat?,cat,mat,a,b,2\nwhere?,cat,mat,a,b,C\n")
    test = write(tmp_path / "v.csv", "where?,cat,mat,a,b,D\n")
    assert _texts(tmp_path, {"name": "multiple_choice"}, train=train, test=test) == ["who sat?\ncat", "what?\nmat"]


def test_passages_of_questions_once(tmp_path: Path) -> None:
    qas = [{"id": str(n), "question": "q", "answers": [{"text": "cat", "answer_start": 4}]} for n in range(2)]
    train = write(
        tmp_path / "t.json",
        json.dumps({"version": "1.1", "data": [{"title": "", "paragraphs": [{"context": "the cat", "qas": qas}]}]}),
    )
    assert _texts(tmp_path, {"name": "question_answering"}, train=train) == ["the cat"]


def test_sentences_of_tagged_words(tmp_path: Path) -> None:
    train = write(tmp_path / "t.conll", "the O\ncat B-X\n\nmat O\n")
    assert _texts(tmp_path, {"name": "token_classification"}, train=train) == ["the cat", "mat"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = make_encoder(tmp_path)
    file, target = tmp_path / "task.yaml", tmp_path / "texts.jsonl"
    train = json_lines(tmp_path / "t.jsonl", [{"text": text, "label": text} for text in ("\u00e9 cat", "mat")])
    settings = {
        "model": {"from": str(encoder)},
        "task": {"name": "classification"},
        "data": {"train": str(train)},
        "training": {"run_dir": str(tmp_path / "run"), "global_batch_size": 1, "micro_batch_size": 1},
    }
    write(file, yaml.safe_dump(settings))
    assert main([str(file), "--output", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}: 2 texts\n"
    lines = target.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "\u00e9 cat"}, {"text": "mat"}]
    assert "\u00e9" in lines[0]
    target.unlink()
    for arguments, message in (
        ([str(tmp_path / "none.yaml"), "--output", str(target)], "none.yaml"),
        (
            [str(file), "--output", str(tmp_path / "no" / "texts.jsonl")],
            "cannot be written (No such file or directory)",
        ),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not target.exists()
