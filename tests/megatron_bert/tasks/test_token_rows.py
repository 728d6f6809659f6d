# SPDX-License-Identifier: Apache-2.0
"""Token classification: JSON lines, tables, comments, letters without a type, and what would fit."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.data.tokenizers import Tokenizer
from parallel.errors import UserError

from .support import json_lines, letter_tokenizer, task_of, write
from .test_token_classification import FILE, NAME, logits_for


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return letter_tokenizer(tmp_path)


ROWS = [
    {"id": "x", "tokens": ["The", "cat", "sat"], "tags": ["O", "B-animal", "I-animal"]},
    {"id": "y", "tokens": ["New York"], "tags": ["B-place"]},
]
LABELS = ["O", "B-animal", "I-animal", "B-place", "I-place"]
WORDS = "sentence,token,tag\nx,The,O\nx,cat,B-animal\n,sat,I-animal\ny,New York,B-place\n"


@pytest.mark.parametrize("form", ["lines", "array", "hub", "numbers", "lists", "words", "blank", "tabs", "plain"])
def test_rows_and_tables(tmp_path: Path, tokenizer: Tokenizer, form: str) -> None:
    """The same two sentences in each form that files of them have."""
    data: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    rows = [dict(row) for row in ROWS]
    if form in ("hub", "numbers"):
        settings = {"labels": LABELS}
        for row in rows:
            tags = [LABELS.index(tag) for tag in row.pop("tags")]
            row["ner_tags"] = tags if form == "hub" else [str(tag) for tag in tags]
    if form in ("lines", "hub", "numbers"):
        path = json_lines(tmp_path / "a.jsonl", rows)
    elif form == "array":
        path = write(tmp_path / "a.json", json.dumps(rows, indent=1))
    elif form == "lists":
        with (path := tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([rows[0], *(row.values() for row in rows)])
    elif form == "words":
        path, data = write(tmp_path / "a.csv", WORDS), {"columns": {"id": "sentence"}}
    elif form == "blank":
        path = write(tmp_path / "a.csv", WORDS.replace("\ny,", "\n\n,").replace("\nx,", "\n,"))
    elif form == "tabs":
        path = write(tmp_path / "a.tsv", WORDS.replace(",", "\t"))
        data = {"format": "tsv", "columns": {"id": "sentence", "tag": "tag"}}
    else:
        content = "The,O\ncat,B-animal\nsat,I-animal\n\nNew York,B-place\n"
        path, data = write(tmp_path / "a.csv", content), {"header": False}
    task = task_of(tokenizer, NAME | settings, {"train": path, **data})
    assert task.labels == tuple(LABELS)
    examples = task.examples("train")
    assert [[e.text[begin:end] for begin, end in e.words] for e in examples] == [row["tokens"] for row in ROWS]
    assert [list(e.tags) for e in examples] == [row["tags"] for row in ROWS]
    named = form in ("words", "tabs")
    assert [e.id for e in examples] == (["x", "y"] if named else ["0", "1"])
    if form not in ("hub", "numbers"):
        untagged = json_lines(tmp_path / "t.jsonl", [{"tokens": ["a"]}, {"tokens": ["a"], "tags": None}])
        task = task_of(tokenizer, NAME, {"train": json_lines(tmp_path / "b.jsonl", ROWS), "test": untagged})
        assert [e.tags for e in task.examples("test")] == [None, None]


@pytest.mark.parametrize(
    ("name", "content", "data", "reason"),
    [
        (
            "a.jsonl",
            '{"tokens": ["a", "b"], "tags": ["O"]}',
            {},
            r"line 1: it has 2 words, but 1 tags in column 'tags'",
        ),
        ("a.jsonl", '{"tokens": "a b", "tags": ["O"]}', {}, "expected a list of words"),
        ("a.jsonl", '{"tokens": ["a", ""], "tags": ["O", "O"]}', {}, "expected a list of words"),
        ("a.jsonl", '{"tokens": [], "tags": []}', {}, "holds no word"),
        ("a.jsonl", '{"tokens": ["a"], "tags": [true]}', {}, "expected a list of tags"),
        (
            "a.jsonl",
            '{"tokens": ["a"], "ner": ["O"]}',
            {},
            r"has a column 'tags' .found: tokens, ner.: .*data\.columns",
        ),
        ("a.jsonl", '{"tokens": ["a"], "tags": [3]}', {}, r"numbers for tags: set task\.labels to their names"),
        ("a.csv", "tokens,tags\n['a' 'b'],['O' 'O']\n", {}, "neither JSON nor a Python list"),
        ("a.csv", "Word,Tag\na,O\n", {}, r"has a column 'token' .found: Word, Tag.: name its columns in data\.columns"),
        ("a.csv", "token,tag\na,O\nb,B-x\n", {}, r"does not show where sentences end: .*data\.columns\.id"),
        ("a.csv", "token,tag\na,O\n\nb,B-x,c\n", {}, r"line 4: it has 3 columns, expected 2"),
        ("a.csv", "token,tag\na,O\n\n,O\nb,B-x\n", {}, "no word in column 'token'"),
        ("a.csv", "token,tag\na,\n\nb,B-x\n", {}, 'its tag "" is none of BIO'),
        ("a.conll", "a O\n", {"header": False}, r"data\.header: false is for csv and tsv"),
        ("a.conll", "a O\n", {"format": "race"}, "race is for multiple choice: set conll"),
        ("a.conll", "a O\n", {"columns": {"id": "x"}}, "no data.columns.id, or set data.format"),
        ("a.conll", "", {}, "is empty"),
        ("a.csv", "token,tag\n", {}, "names its columns in line 1, but holds no usable row"),
    ],
)
def test_bad_rows(tmp_path: Path, tokenizer: Tokenizer, name: str, content: str, data: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        task_of(tokenizer, NAME, {"train": write(tmp_path / name, content), **data}).examples("train")


def test_letters_without_a_type(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.conll", "a B\nb I\nc O\nd B\n")
    task = task_of(tokenizer, NAME, {"train": path})
    assert task.labels == ("O", "B", "I")
    assert task.metrics_names == ("f1", "precision", "recall", "accuracy")
    examples = task.examples("train")
    instances = task.instances(examples, train=True)
    (prediction,) = task.predictions(examples, instances, logits_for(task, instances))
    assert [(e["type"], e["text"]) for e in prediction["entities"]] == [("", "a b"), ("", "d")]
    assert task.metrics(examples, [prediction])["f1"] == 1.0
    constrained = task_of(tokenizer, NAME | {"labels": ["O", "B", "I"], "decoding": "constrained"}, {"train": path})
    assert constrained.predictions(examples, instances, logits_for(task, instances))[0]["tags"] == ["B", "I", "O", "B"]


def test_comments(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As in CoNLL-U and MultiCoNER; "#" is a word too."""
    content = "# id 5a domain=en\na _ _ B-x\n# _ _ O\n\n# text = a b\n# sent_id = 3\nb _ _ O\n\n# _ _ O\nc _ _ O\n"
    path = write(tmp_path / "a.conll", content + "\n# only a comment\n\n# _ _ B-x\n")
    examples = task_of(tokenizer, NAME, {"train": path}).examples("train")
    assert [(e.id, e.text, e.where.rsplit(" ", 1)[1]) for e in examples] == [
        ("0", "a #", "2"),
        ("1", "b", "7"),
        ("2", "# c", "9"),
        ("3", "#", "14"),
    ]
    path = write(tmp_path / "t.conll", "# id 3\n#\nb\n")
    task = task_of(tokenizer, NAME | {"labels": ["O", "B-x", "I-x"]}, {"test": path})
    assert [e.text for e in task.examples("test")] == ["# b"]


@pytest.mark.parametrize(
    ("content", "data", "reason"),
    [
        ("a U-x\n\nb B-x\nc L-x\n", {}, r"all tags of the file follow BILOU: set task\.scheme: BILOU"),
        ("a S-x\n\nb B-x\nc E-x\n", {}, r"follow IOBES: set task\.scheme: IOBES"),
        ("a I-x\n\nb O\nc I-x\n", {}, r"follow IOB1 and IO: set task\.scheme: IOB1"),
        ("a I-x\nc B-x\n", {}, r"follow IOB1: set task\.scheme: IOB1"),
        ("a B-x NN\nb O DT\n", {}, r'"NN" is none of BIO.*set data\.columns\.tag \(now -1\) to 1'),
        ("a B-x NN\nb O DT\n", {"columns": {"tag": 2}}, r"set data\.columns\.tag \(now 2\) to 1"),
        ("a PER\nb LOC\n", {}, r"set data\.columns\.tag \(now -1\) to the column of the tags"),
    ],
)
def test_what_would_fit(tmp_path: Path, tokenizer: Tokenizer, content: str, data: dict, reason: str) -> None:
    """Said whatever is to be done with bad rows: skipping them would leave out all entities."""
    path = write(tmp_path / "a.conll", content)
    for policy in ("error", "skip"):
        with pytest.raises(UserError, match=reason):
            task_of(tokenizer, NAME, {"train": path, "on_bad_row": policy, **data})
    with pytest.raises(UserError, match=r"the labels follow BILOU: set task\.scheme: BILOU"):
        task_of(tokenizer, NAME | {"labels": ["O", "B-x", "L-x"]})


def test_several_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first, second = write(tmp_path / "a.conll", FILE), json_lines(tmp_path / "b.jsonl", ROWS[:1])
    task = task_of(tokenizer, NAME, {"train": [second, first]})
    assert task.labels == tuple(LABELS)
    assert [e.id for e in task.examples("train")] == ["0", "1", "2", "3"]


def test_windows_leave_out_no_word(tokenizer: Tokenizer) -> None:
    settings = NAME | {"labels": ["O", "B-x", "I-x"], "max_length": 16}
    assert task_of(tokenizer, settings).doc_stride == 8
    with pytest.raises(UserError, match=r"task\.doc_stride 15 would leave out text.*set it to 14 or less"):
        task_of(tokenizer, settings | {"doc_stride": 15})
