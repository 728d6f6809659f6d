# SPDX-License-Identifier: Apache-2.0
"""Multiple choice: formats, sequences, metrics."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.tasks.multiple_choice import cut_around, fill
from megatron_bert.tasks.registry import restore_task
from megatron_bert.tasks.task import IGNORED
from parallel.errors import UserError

from .support import json_lines, letter_tokenizer, task_of, write

NAME = {"name": "multiple_choice"}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return letter_tokenizer(tmp_path)


def article(part: str, number: int) -> dict[str, Any]:
    return {
        "id": f"{part}{number}.txt",
        "article": f"the cat sat. {number}",
        "questions": ["the cat _ .", "who sat?"],
        "options": [["sat", "ran", "ate", "hid"], ["cat", "mat", "dog", "i"]],
        "answers": ["A", "D"],
    }


def race(folder: Path) -> Path:
    for split in ("train", "dev", "test"):
        for part in ("middle", "high"):
            write(folder / split / part / "1.txt", json.dumps(article(part, 1)))
            lines = [json.dumps(article(part, number)) for number in (2, 3)]
            write(folder / split / part / "2.txt", "\n".join(lines) + "\n\n")
    return folder


def text_of(tokenizer: Tokenizer, tokens: np.ndarray, types: np.ndarray) -> tuple[str, str]:
    first = [int(token) for token, segment in zip(tokens, types, strict=True) if not segment]
    second = [int(token) for token, segment in zip(tokens, types, strict=True) if segment]
    assert (first[0], first[-1]) == (tokenizer.cls_id, tokenizer.sep_id)
    assert not second or second[-1] == tokenizer.sep_id
    return tokenizer.decode(first), tokenizer.decode(second)


def test_race(tmp_path: Path, tokenizer: Tokenizer) -> None:
    task = task_of(tokenizer, NAME, {"directory": race(tmp_path / "RACE")})
    assert task.splits == ("train", "valid", "test")
    assert (task.head.kind, task.head.outputs) == ("choice", 1)
    examples = task.examples("valid")
    assert [e.id for e in examples][:3] == ["high1.txt-0", "high1.txt-1", "high2.txt-0"]
    assert [e.part for e in examples] == ["high"] * 6 + ["middle"] * 6
    assert [e.answer for e in examples] == [0, 3] * 6
    instances = task.instances(examples[:2], train=True)
    assert [instance.label.tolist() for instance in instances] == [[0], [3]]
    blank, plain = ([text_of(tokenizer, f.tokens, f.types) for f in instance.features] for instance in instances)
    assert blank == [(f"the cat {word}.", "the cat sat. 1") for word in ("sat", "ran", "ate", "hid")]
    assert plain == [(f"who sat? {word}", "the cat sat. 1") for word in ("cat", "mat", "dog", "i")]
    assert all(f.rows.tolist() == [0] for instance in instances for f in instance.features)
    fingerprint = task.data_fingerprints()["train"][0]
    assert (fingerprint["path"], fingerprint["examples"]) == (str(tmp_path / "RACE/train"), None)


def test_race_without_the_whole_directory(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = race(tmp_path / "RACE")
    task = task_of(tokenizer, NAME, {"train": folder / "train/middle", "valid": folder / "dev/high/2.txt"})
    assert (len(task.examples("train")), len(task.examples("valid"))) == (6, 4)
    # Questions on one article stay together.
    task = task_of(tokenizer, NAME, {"train": folder / "train", "valid_fraction": 0.34})
    kept, held = ({e.id.split("-")[0] for e in task.examples(split)} for split in ("train", "valid"))
    assert (len(kept), len(held), kept & held) == (4, 2, set())


def test_metrics_by_part(tmp_path: Path, tokenizer: Tokenizer) -> None:
    task = task_of(tokenizer, NAME, {"directory": race(tmp_path / "RACE")})
    examples = task.examples("test")
    instances = task.instances(examples, train=False)
    chosen = [0, 3, 0, 3, 0, 3, 0, 0, 0, 0, 0, 3]
    logits = [np.eye(4, dtype=np.float32)[number] for number in chosen]
    predictions = task.predictions(examples, instances, logits)
    assert [p["label"] for p in predictions] == chosen
    assert predictions[1]["choice"] == "i"
    assert predictions[1]["probabilities"] == pytest.approx([*[1 / (3 + np.e)] * 3, np.e / (3 + np.e)])
    assert task.metrics(examples, predictions) == {
        "accuracy": pytest.approx(10 / 12),
        "accuracy_high": 1.0,
        "accuracy_middle": pytest.approx(4 / 6),
    }


SWAG = ["", "video-id", "fold-ind", "startphrase", "sent1", "sent2", "gold-source", *(f"ending{n}" for n in range(4))]


def test_swag(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = ["0", "v", "1", "the cat sat. it", '"the cat, sat"', "it", "gold", "ran", "sat", "ate", "hid"]
    train = ",".join([*SWAG, "label"]) + "\n" + ",".join(row) + ",2\n"
    write(tmp_path / "swag/train.csv", train)
    write(tmp_path / "swag/test.csv", "\n".join([",".join(SWAG), ",".join(row)]))
    task = task_of(tokenizer, NAME, {"directory": tmp_path / "swag"})
    (example,) = task.examples("train")
    assert (example.question, example.answer) == ("the cat, sat", 2)
    assert example.choices == ("it ran", "it sat", "it ate", "it hid")
    (instance,) = task.instances([example], train=True)
    assert text_of(tokenizer, instance.features[1].tokens, instance.features[1].types) == ("the cat, sat", "it sat")
    (test,) = task.examples("test")
    assert test.answer is None
    assert task.instances([test], train=False)[0].label.tolist() == [IGNORED]


def test_arc(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = 'who?,cat,mat,"a, b",dog,C\nwhy?,i,me,us,,B\nfive?,a,b,c,d,e,E\nhow?,a,b,c,d,3\n'
    path = write(tmp_path / "arc.csv", rows)
    task = task_of(tokenizer, NAME, {"train": path})
    examples = task.examples("train")
    assert [(len(e.choices), e.answer) for e in examples] == [(4, 2), (3, 1), (5, 4), (4, 2)]
    instances = task.instances(examples, train=True)
    assert [len(instance.features) for instance in instances] == [4, 3, 5, 4]
    assert text_of(tokenizer, instances[0].features[2].tokens, instances[0].features[2].types) == ("who?", "a, b")
    logits = [np.arange(len(instance.features), dtype=np.float32) for instance in instances]
    predictions = task.predictions(examples, instances, logits)
    assert [p["label"] for p in predictions] == [3, 2, 4, 3]
    assert task.metrics(examples, predictions) == {"accuracy": 0.25}
    line = {
        "id": "Q1",
        "question": {"stem": "who?", "choices": [{"text": "cat", "label": "1"}, {"text": "mat", "label": "2"}]},
    }
    folder = tmp_path / "ARC"
    json_lines(folder / "ARC-Easy-Train.jsonl", [line | {"answerKey": "2"}])
    json_lines(folder / "ARC-Easy-Test.jsonl", [line])
    task = task_of(tokenizer, NAME, {"directory": folder})
    (example,) = task.examples("train")
    assert (example.id, example.question, example.choices, example.answer) == ("Q1", "who?", ("cat", "mat"), 1)
    assert task.examples("test")[0].answer is None


def test_json_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        {"question": "who _?", "choices": ["cat", "mat"], "context": "the cat sat", "label": 1, "id": "x"},
        {"question": "who?", "choices": ["cat", "mat", "i"], "label": 0},
    ]
    task = task_of(tokenizer, NAME, {"train": json_lines(tmp_path / "a.jsonl", rows)})
    examples = task.examples("train")
    assert [(e.id, e.context, e.answer) for e in examples] == [("x", "the cat sat", 1), ("1", None, 0)]
    streamed = restore_task(task.describe(), tokenizer).example_from(rows[0], "line 1")
    assert (streamed.choices, streamed.context, streamed.answer) == (("cat", "mat"), "the cat sat", None)
    assert len(task.instances([streamed], train=False)[0].features) == 2


HUB = [
    {"id": "x", "article": "the cat", "question": "who?", "options": ["cat", "mat", "i"], "answer": "B"},
    {"id": "x", "context": "the cat", "question": "who?", "choices": ["cat", "mat", "i"], "label": "1"},
    {"id": "x", "context": "the cat", "question": "who?", "choices": ["cat", "mat", "i"], "label": "b"},
    {"id": "x", "context": "the cat", "question": "who?", "choices": ["cat", "mat", "i"], "label": 1.0},
    {"id": "x", "context": "the cat", "question": "who?", "choices": ["cat", "mat", "i"], "label": "mat"},
    {
        "id": "x",
        "context": "the cat",
        "question": "who?",
        "choices": {"text": ["cat", "mat", "i"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
]


@pytest.mark.parametrize("row", HUB)
@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
def test_rows_as_on_the_hub(tmp_path: Path, tokenizer: Tokenizer, row: dict[str, Any], form: str) -> None:
    """Rows of RACE, ARC and the like, as JSON lines, as an array and as CSV with lists in cells."""
    path = tmp_path / f"a.{form}"
    if form == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([row, row.values()])
    else:
        write(path, json.dumps(row if form == "jsonl" else [row]))
    (example,) = task_of(tokenizer, NAME, {"train": path}).examples("train")
    assert (example.id, example.question, example.choices) == ("x", "who?", ("cat", "mat", "i"))
    assert (example.context, example.answer) == ("the cat", 1)
    if "article" in row and form != "csv":
        (example,) = task_of(tokenizer, NAME, {"train": path, "format": "race"}).examples("train")
        assert example.answer == 1


def test_rows_of_swag(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {"sent1": "the cat", "sent2": "it", **{f"ending{n}": f"e{n}" for n in range(4)}}
    for number, label in enumerate((2, "2", "C")):
        path = json_lines(tmp_path / f"{number}.jsonl", [row | {"label": label}])
        (example,) = task_of(tokenizer, NAME, {"train": path}).examples("train")
        assert (example.choices, example.answer) == (("it e0", "it e1", "it e2", "it e3"), 2)
    path = json_lines(tmp_path / "t.jsonl", [row | {"label": label} for label in (-1, "", None, 3)])
    assert [e.answer for e in task_of(tokenizer, NAME, {"test": path}).examples("test")] == [None, None, None, 3]


def test_columns_are_chosen(tmp_path: Path, tokenizer: Tokenizer) -> None:
    columns: dict[str, Any] = {"id": "n", "question": "q", "choices": ["A", "B", "C"], "label": "right", "context": "p"}
    path = write(tmp_path / "a.csv", "n,p,q,A,B,C,right\nx,the cat,who?,cat,mat,i,C\ny,,why?,a,b,,0\n")
    examples = task_of(tokenizer, NAME, {"train": path, "columns": columns}).examples("train")
    assert [(e.id, e.context, e.question, e.choices, e.answer) for e in examples] == [
        ("x", "the cat", "who?", ("cat", "mat", "i"), 2),
        ("y", None, "why?", ("a", "b"), 0),
    ]
    path = write(tmp_path / "b.tsv", "who?\tcat\tmat\t1\n")
    data = {"train": path, "header": False, "columns": {"question": 0, "choices": [1, 2], "label": -1}}
    assert [e.answer for e in task_of(tokenizer, NAME, data).examples("train")] == [1]
    row = {"stem": "who?", "ends": ["cat", "mat"], "gold": 0}
    path = json_lines(tmp_path / "c.jsonl", [row])
    data = {"train": path, "columns": {"question": "stem", "choices": "ends", "label": "gold"}}
    assert [e.choices for e in task_of(tokenizer, NAME, data).examples("train")] == [("cat", "mat")]
    data["columns"]["label"] = "golden"  # type: ignore[index]
    with pytest.raises(UserError, match=r"no row of .* has a column 'golden' \(found: stem, ends, gold\)"):
        task_of(tokenizer, NAME, data).examples("train")
    with pytest.raises(UserError, match="a question has one right choice"):
        task_of(tokenizer, NAME, {"train": path, "columns": {"label": ["a", "b"]}})


def test_several_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first = write(tmp_path / "a.csv", "who?,cat,mat,A\nwhy?,i,me,B\n")
    second = json_lines(tmp_path / "b.jsonl", [HUB[1] | {"id": "z"}])
    third = write(tmp_path / "c.csv", "how?,a,b,A\n")
    examples = task_of(tokenizer, NAME, {"train": [first, second, third]}).examples("train")
    assert [(e.id, e.answer) for e in examples] == [("0", 0), ("1", 1), ("z", 1), ("3", 0)]


def test_settings_that_do_nothing_with_the_data(tmp_path: Path, tokenizer: Tokenizer) -> None:
    plain = write(tmp_path / "a.csv", "who?,cat,mat,A\n")
    settings = NAME | {"max_query_length": 20}
    with pytest.raises(UserError, match=r"task\.max_query_length is 20, but no question of .*a\.csv has a passage"):
        task_of(tokenizer, settings, {"train": plain}).examples("train")
    passage = json_lines(tmp_path / "b.jsonl", [HUB[1]])
    task = task_of(tokenizer, settings, {"train": [plain, passage]})
    assert len(task.examples("train")) == 2
    assert restore_task(task.describe(), tokenizer).max_query_length == 20
    with pytest.raises(UserError, match=r"data\.header: false means nothing to the format race"):
        task_of(tokenizer, NAME, {"train": passage, "format": "race", "header": False}).examples("train")
    data = {"train": plain, "format": "arc", "columns": {"question": 0}}
    with pytest.raises(UserError, match=r"data\.columns means nothing to the format arc"):
        task_of(tokenizer, NAME, data).examples("train")


BAD = [
    ("a.csv", "stem,a,b,answer key\n", "'answer key' is none of .* in data.columns"),
    ("a.jsonl", '{"question": "q", "choices": ["B", "A"], "label": "A"}', "may be choice 0 or 1: give the number"),
    ("a.jsonl", '{"question": "q", "choices": ["a", "b"], "label": true}', "true is not the number"),
    (
        "a.jsonl",
        '{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "A"]}, "label": "A"}',
        "2 texts, but the labels A, A",
    ),
    (
        "a.jsonl",
        '{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "1"}',
        "'1' is none of A, B",
    ),
    ("a.csv", "q,a,b,c,d,E\n", "answer 'E' is none of A, B, C, D"),
    ("a.csv", "q,,,,,3\n", "0 choices, expected 2 or more"),
    ("a.csv", "q,A\n", "2 columns, expected question"),
    ("a.jsonl", '{"question": "q", "choices": ["a"], "label": 0}', "1 choices, expected 2"),
    ("a.jsonl", '{"question": "q", "choices": ["a", "b"], "label": 2}', "choice 2, but it has 2"),
    ("a.jsonl", '{"question": "q", "choices": ["a", "b"], "label": -1}', "choice -1, but it has 2"),
    ("a.jsonl", '{"question": "q", "choices": ["a", "b"], "label": "C"}', "'C' is not the number.* A to B"),
    ("a.jsonl", '{"question": "q", "choices": ["a", "b"], "label": null}', "no answer"),
    ("a.jsonl", '{"question": "q", "choices": "ab", "label": 0}', "not a list of texts"),
    ("a.jsonl", '{"question": {"stem": "q"}, "answerKey": "A"}', '"stem" and "choices"'),
    (
        "a.txt",
        '{"article": "x", "questions": ["q"], "options": [], "answers": ["A"]}',
        "1 questions, 0 options and 1 answers",
    ),
    ("a.txt", '{"article": "x", "questions": ["q"], "options": [["a", "b"]], "answers": ["C"]}', "'C' is none of A, B"),
    (
        "a.txt",
        '{"article": 1, "questions": ["q"], "options": [["a", "b"]], "answers": ["A"]}',
        "holds 1, expected text",
    ),
]


@pytest.mark.parametrize(("name", "content", "reason"), BAD)
def test_bad_rows(tmp_path: Path, tokenizer: Tokenizer, name: str, content: str, reason: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=rf"line 1: .*{reason}"):
        task_of(tokenizer, NAME, {"train": path}).examples("train")
    task = task_of(tokenizer, NAME, {"train": path, "on_bad_row": "skip"})
    with pytest.raises(UserError, match="no usable row"):
        task.examples("train")
    assert task.bad_rows.count == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "q"}, 'list of texts under "choices"'),
        ({"question": "q", "choices": ["a"]}, '1 "choices", expected 2'),
        ({"question": "q", "choices": ["a", 1]}, 'list of texts under "choices"'),
        ({"choices": ["a", "b"]}, 'no "question"'),
    ],
)
def test_bad_rows_of_a_stream(tokenizer: Tokenizer, row: dict, reason: str) -> None:
    with pytest.raises(UserError, match=rf"line 9 .*{reason}"):
        task_of(tokenizer, NAME).example_from(row, "line 9")


def test_wrong_directories_and_formats(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="not a directory of RACE"):
        _ = task_of(tokenizer, NAME, {"directory": tmp_path}).splits
    path = write(tmp_path / "a.csv", "q,a,b,A\n")
    with pytest.raises(UserError, match="conll is for token classification"):
        task_of(tokenizer, NAME, {"train": path, "format": "conll"}).examples("train")
    with pytest.raises(UserError, match="leaves no room for the passage"):
        task_of(tokenizer, NAME | {"max_length": 32, "max_query_length": 30})


def test_blanks() -> None:
    assert fill("a _ b", "x y") == ("a x y b", (2, 5))
    assert fill("a ____?", "x") == ("a x?", (2, 3))
    assert fill("_ and _", r"\1") == (r"\1 and \1", (0, 2))
    assert fill("why?", "x y") == ("why? x y", (5, 8))


def test_a_long_question_keeps_the_choice(tokenizer: Tokenizer) -> None:
    text, place = fill("abcdefgh _ ijklmnop", "xyz")
    (found,) = tokenizer.encode_batch_with_spans([text])
    kept = {limit: tokenizer.decode(cut_around(found, place, limit)) for limit in (2, 3, 5, 12, 19, 30)}
    assert kept[30] == "abcdefgh xyz ijklmnop"
    assert kept[19] == "abcdefgh xyz ijklmnop"
    assert kept[12] == "abcdefgh xyz i"
    assert kept[5].endswith("xyz")
    assert kept[3] == "xyz"
    assert kept[2] == "xy"


def test_long_passages_are_cut(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {"question": "q" * 40 + " _", "choices": ["cat", "mat" * 20], "context": "the cat sat " * 40}
    task = task_of(tokenizer, NAME | {"max_length": 64, "max_query_length": 24})
    (instance,) = task.instances([task.example_from(row, "line 1")], train=False)
    # "mat" is one piece at the start of a word, and its letters are pieces later on.
    for feature, choice in zip(instance.features, ("cat", ("mat" * 20)[:26]), strict=True):
        assert len(feature.tokens) == 64
        question, passage = text_of(tokenizer, feature.tokens, feature.types)
        assert question.endswith(choice)
        assert passage.startswith("the cat sat the cat sat")
        assert int((feature.types == 0).sum()) == 24 + 2
