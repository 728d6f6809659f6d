# SPDX-License-Identifier: Apache-2.0
"""Classification and regression on tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertTokenizerFast

from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.tasks.encoding import kept_lengths
from megatron_bert.tasks.registry import restore_task
from megatron_bert.tasks.settings import TaskDataSettings
from megatron_bert.tasks.task import IGNORED
from parallel.errors import UserError

from .support import json_lines, letter_tokenizer, scores_for, task_of, write


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return letter_tokenizer(tmp_path)


def test_pairs_are_cut_as_in_bert() -> None:
    """Against the loop of BERT's authors: the longer text loses its last token, the second one if equal."""
    for first in range(8):
        for second in range(8):
            for room in range(1, 16):
                kept = [first, second]
                while sum(kept) > room:
                    kept[0 if kept[0] > kept[1] else 1] -= 1
                assert kept_lengths(first, second, room) == tuple(kept)


def test_sequences_equal_transformers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    peer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), do_lower_case=True)
    rows = [("The cat sat.", "on the MAT"), ("a" * 30, "b c"), ("x", "longest " * 9), ("", "x y")]
    lines = [f"{a}\t{b}\t{number % 2}\n" for number, (a, b) in enumerate(rows)]
    path = write(tmp_path / "a.tsv", "text\tother\tlabel\n" + "".join(lines))
    for pair in (False, True):
        columns = {"text_pair": "other"} if pair else {}
        task = task_of(tokenizer, {"name": "classification", "max_length": 20}, {"train": path, "columns": columns})
        instances = task.instances(task.examples("train"), train=True)
        assert [instance.label.tolist() for instance in instances] == [[0], [1], [0], [1]]
        for instance, (a, b) in zip(instances, rows, strict=True):
            expected = peer(a, b if pair else None, truncation=True, max_length=20)
            (feature,) = instance.features
            assert feature.tokens.tolist() == expected["input_ids"]
            assert feature.types.tolist() == expected["token_type_ids"]
            assert feature.rows.tolist() == [0]
            assert (feature.tokens.dtype, feature.types.dtype) == (np.int32, np.int8)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["b", "a", "b"], ("a", "b")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["ä", "Z", "a"], ("Z", "a", "ä")),
    ],
)
def test_labels_are_found_in_a_stable_order(
    tmp_path: Path, tokenizer: Tokenizer, labels: list[str], expected: tuple[str, ...]
) -> None:
    for order in (labels, labels[::-1]):
        path = write(tmp_path / "a.csv", "text,label\n" + "".join(f"x,{label}\n" for label in order))
        task = task_of(tokenizer, {"name": "classification"}, {"train": path})
        assert task.labels == expected
        assert [expected[int(e.target[0])] for e in task.examples("train")] == order


def test_single_label(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = json_lines(tmp_path / "a.jsonl", [{"text": "a", "label": n, "name": f"r{n}"} for n in (3, 1, 3, 2)])
    task = task_of(tokenizer, {"name": "classification"}, {"train": path, "columns": {"id": "name"}})
    assert task.labels == ("1", "2", "3")
    assert (task.head.kind, task.head.outputs, task.head.problem) == ("sequence", 3, "single_label_classification")
    assert (task.metric, task.metrics_names) == ("accuracy", ("accuracy", "f1_macro", "matthews"))
    examples = task.examples("train")
    instances = task.instances(examples, train=True)
    predictions = task.predictions(examples, instances, scores_for([2, 0, 0, 1], 3))
    assert [p["label"] for p in predictions] == ["3", "1", "1", "2"]
    assert [p["id"] for p in predictions] == ["r3", "r1", "r3", "r2"]
    top = math.exp(5) / (math.exp(5) + 2)
    assert predictions[0]["probabilities"] == pytest.approx({"1": (1 - top) / 2, "2": (1 - top) / 2, "3": top})
    assert task.metrics(examples, predictions)["accuracy"] == 3 / 4
    labels, counts = task.confusion(examples, predictions) or ((), np.zeros(0))
    assert labels == ("1", "2", "3")
    assert counts.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]


MULTI = [("red,blue", ["blue", "red"]), ("", []), (" red , green,red", ["green", "red"])]


@pytest.mark.parametrize("layout", ["separator", "list", "columns"])
def test_multi_label(tmp_path: Path, tokenizer: Tokenizer, layout: str) -> None:
    columns: Any = {}
    names = ["blue", "green", "red"]
    if layout == "separator":
        path = write(tmp_path / "a.tsv", "text\tlabel\n" + "".join(f"x\t{cell}\n" for cell, _ in MULTI))
    elif layout == "list":
        path = json_lines(tmp_path / "a.jsonl", [{"text": "x", "label": found} for _, found in MULTI])
    else:
        flags = ["\t".join(str(int(name in found)) for name in names) for _, found in MULTI]
        path = write(tmp_path / "a.tsv", "text\t" + "\t".join(names) + "\n" + "".join(f"x\t{f}\n" for f in flags))
        columns = {"label": names}
    task = task_of(tokenizer, {"name": "classification", "multi_label": True}, {"train": path, "columns": columns})
    assert task.labels == tuple(names)
    assert task.head.problem == "multi_label_classification"
    examples = task.examples("train")
    instances = task.instances(examples, train=True)
    assert [instance.label.tolist() for instance in instances] == [[1, 0, 1], [0, 0, 0], [0, 1, 1]]
    assert instances[0].label.dtype == np.float32
    logits = [np.array(row, dtype=np.float32) for row in ([9, -9, 9], [-9, -9, -9], [-9, 9, -9])]
    predictions = task.predictions(examples, instances, logits)
    assert [p["labels"] for p in predictions] == [["blue", "red"], [], ["green"]]
    assert task.metrics(examples, predictions)["accuracy"] == pytest.approx(2 / 3)
    assert task.confusion(examples, predictions) is None


def test_threshold_and_separator_of_labels(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.tsv", "text\tlabel\nx\ta,1|b\n")
    settings = {"name": "classification", "multi_label": True, "label_threshold": 0.9}
    task = task_of(tokenizer, settings, {"train": path, "label_separator": "|"})
    assert task.labels == ("a,1", "b")
    instances = task.instances(task.examples("train"), train=True)
    logits = [np.log(np.array([8.9, 9.1], dtype=np.float32))]  # probabilities 0.899 and 0.901
    assert task.predictions(task.examples("train"), instances, logits)[0]["labels"] == ["b"]


def test_regression(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.csv", "1.5,x y\n-2e-1,z\n")
    data = {"train": path, "header": False, "columns": {"text": -1, "label": 0}}
    task = task_of(tokenizer, {"name": "regression"}, data)
    assert (task.labels, task.head.outputs, task.head.problem) == ((), 1, "regression")
    examples = task.examples("train")
    instances = task.instances(examples, train=True)
    assert [instance.label.tolist() for instance in instances] == [[1.5], [pytest.approx(-0.2)]]
    predictions = task.predictions(examples, instances, [np.array([2.0]), np.array([0.0])])
    assert [p["value"] for p in predictions] == [2.0, 0.0]
    found = task.metrics(examples, predictions)
    assert tuple(found) == task.metrics_names
    assert found["pearson"] == pytest.approx(1.0)
    assert all(name.endswith("loss") or name in ("pearson", "spearman", "pearson_spearman") for name in found)


LABELS = [
    ([True, False, True], ("false", "true"), [1, 0, 1]),
    ([1.0, 0, "1"], ("0", "1"), [1, 0, 1]),
    (["yes", "no", "yes"], ("no", "yes"), [1, 0, 1]),
]


@pytest.mark.parametrize(("values", "names", "numbers"), LABELS)
def test_labels_of_json(
    tmp_path: Path, tokenizer: Tokenizer, values: list[Any], names: tuple[str, ...], numbers: list[int]
) -> None:
    path = json_lines(tmp_path / "a.jsonl", [{"text": "x", "label": value} for value in values])
    task = task_of(tokenizer, {"name": "classification"}, {"train": path})
    assert (task.labels, [e.target[0] for e in task.examples("train")]) == (names, numbers)
    task = task_of(tokenizer, {"name": "classification", "labels": list(names)}, {"train": path})
    assert [e.target[0] for e in task.examples("train")] == numbers


def test_a_label_whose_case_differs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.csv", "text,label\nx,True\n")
    with pytest.raises(UserError, match=r'"True" is unknown .*"true" differs in its case, .*quote .*task\.labels'):
        task_of(tokenizer, {"name": "classification", "labels": [True, False]}, {"train": path}).examples("train")


@pytest.mark.parametrize("cell", ["-1", ""])
def test_test_files_may_say_that_a_label_is_unknown(tmp_path: Path, tokenizer: Tokenizer, cell: str) -> None:
    """As test files on the Hugging Face hub do."""
    test = write(tmp_path / "t.csv", f"text,label\nx,{cell}\ny,1\n")
    task = task_of(tokenizer, {"name": "classification", "labels": ["0", "1"]}, {"test": test, "valid": test})
    assert [e.target for e in task.examples("test")] == [(), (1.0,)]
    with pytest.raises(UserError, match="line 2: its label"):
        task.examples("valid")
    found = task_of(tokenizer, {"name": "classification", "labels": ["-1", "1"]}, {"test": test}).examples("test")
    assert [e.target for e in found] == [(0.0,) if cell else (), (1.0,)]


def test_flags_as_they_are_written_elsewhere(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": "x", "a": "0.0", "b": True}, {"text": "x", "a": 1.0, "b": "False"}]
    data = {"train": json_lines(tmp_path / "a.jsonl", rows), "columns": {"label": ["a", "b"]}}
    task = task_of(tokenizer, {"name": "classification", "multi_label": True}, data)
    assert [e.target for e in task.examples("train")] == [(0.0, 1.0), (1.0, 0.0)]


def test_lists_of_labels_in_cells(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.tsv", "text\tlabel\nx\t['a', 'b']\ny\t[]\nz\tb\n")
    task = task_of(tokenizer, {"name": "classification", "multi_label": True}, {"train": path})
    assert task.labels == ("a", "b")
    assert [e.target for e in task.examples("train")] == [(1.0, 1.0), (0.0, 0.0), (0.0, 1.0)]


def test_several_files_are_read_in_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As if the second followed in the first; the formats may differ."""
    first = write(tmp_path / "a.tsv", "text\tlabel\nx\ta\nbad\ny\ta\n")
    second = json_lines(tmp_path / "b.jsonl", [{"text": "z", "label": "b"}])
    data = {"train": [first, second], "test": [second, first], "on_bad_row": "skip"}
    task = task_of(tokenizer, {"name": "classification"}, data)
    assert task.labels == ("a", "b")
    assert [(e.id, e.text, e.where) for e in task.examples("train")] == [
        ("0", "x", f"{first} line 2"),
        ("2", "y", f"{first} line 4"),
        ("3", "z", f"{second} line 1"),
    ]
    assert [(e.id, e.text) for e in task.examples("test")] == [("0", "z"), ("1", "x"), ("3", "y")]
    assert [entry["path"] for entry in task.data_fingerprints()["train"]] == [str(first), str(second)]
    with pytest.raises(UserError, match=r"data\.train is .*c\.tsv, which does not exist"):
        task_of(tokenizer, {"name": "classification"}, {"train": [first, tmp_path / "c.tsv"]})


def test_settings_that_do_nothing_with_the_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = json_lines(tmp_path / "a.jsonl", [{"text": "x", "label": "a"}])
    with pytest.raises(UserError, match=r"data\.header: false is for tsv and csv"):
        task_of(tokenizer, {"name": "classification"}, {"train": path, "header": False})
    with pytest.raises(UserError, match=r"data\.label_separator is for multi-label"):
        task_of(tokenizer, {"name": "classification"}, {"train": path, "label_separator": ";"})


BAD = [
    ({"name": "classification"}, '{"text": "x", "label": ["a"]}', r"is a list, .* set task\.multi_label"),
    ({"name": "classification"}, '{"text": "x", "label": 1.5}', r"1\.5 is neither .* task\.name: regression"),
    ({"name": "classification", "multi_label": True}, '{"text": "x", "label": [1.0, 0.0]}', "one 0 or 1 for each"),
    ({"name": "classification", "multi_label": True}, '{"text": "x", "label": [1, 0, 0]}', "one 0 or 1 for each"),
    ({"name": "classification"}, '{"text": "x"}', "no column 'label' .found: text."),
    ({"name": "classification"}, '{"text": "x", "label": null}', "neither a text nor a whole number"),
    ({"name": "classification"}, '{"text": "x", "label": " "}', "label is empty"),
    ({"name": "classification"}, '{"label": "a"}', "no column 'text'"),
    (
        {"name": "classification", "labels": ["a", "b"]},
        '{"text": "x", "label": "c"}',
        '"c" is unknown .known: a, b',
    ),
    ({"name": "classification", "multi_label": True}, '{"text": "x", "label": [1.5]}', "neither a text nor"),
    ({"name": "regression"}, '{"text": "x", "label": "high"}', "'high' is not a finite number"),
    ({"name": "regression"}, '{"text": "x", "label": "nan"}', "'nan' is not a finite number"),
    ({"name": "regression"}, '{"text": "x", "label": true}', "True is not a finite number"),
]


@pytest.mark.parametrize(("settings", "row", "reason"), BAD)
def test_bad_rows(tmp_path: Path, tokenizer: Tokenizer, settings: dict, row: str, reason: str) -> None:
    numeric = settings["name"] == "regression"
    good = [json.dumps({"text": "x", "label": label}) for label in (("1", "2") if numeric else ("a", "b"))]
    path = write(tmp_path / "a.jsonl", "\n".join([good[0], row, good[1]]))
    with pytest.raises(UserError, match=rf"a\.jsonl line 2: .*{reason}"):
        task_of(tokenizer, settings, {"train": path}).examples("train")
    task = task_of(tokenizer, settings, {"train": path, "on_bad_row": "skip"})
    assert [example.id for example in task.examples("train")] == ["0", "2"]
    assert task.bad_rows.count == 1
    assert task.data_fingerprints()["train"][0] | {"sha256": ""} == {
        "path": str(path),
        "sha256": "",
        "bytes": path.stat().st_size,
        "examples": 2,
        "skipped": 1,
    }


def test_flags_must_be_zero_or_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.tsv", "text\ta\tb\nx\t1\t2\n")
    data = {"train": path, "columns": {"label": ["a", "b"]}}
    task = task_of(tokenizer, {"name": "classification", "multi_label": True}, data)
    with pytest.raises(UserError, match="column 'b' holds '2', expected 0 or 1"):
        task.examples("train")
    with pytest.raises(UserError, match=r"set task\.multi_label"):
        task_of(tokenizer, {"name": "classification"}, data)
    with pytest.raises(UserError, match=r"1 names, but data\.columns\.label has 2 columns"):
        task_of(tokenizer, {"name": "classification", "multi_label": True, "labels": ["q"]}, data)


def test_test_files_need_no_labels(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train = write(tmp_path / "a.tsv", "text\tlabel\nx\ta\ny\tb\n")
    test = write(tmp_path / "t.tsv", "text\nx\ny\n")
    task = task_of(tokenizer, {"name": "classification"}, {"train": train, "test": test})
    examples = task.examples("test")
    instances = task.instances(examples, train=False)
    assert [instance.label.tolist() for instance in instances] == [[IGNORED]] * 2
    predictions = task.predictions(examples, instances, scores_for([0, 1], 2))
    assert task.metrics(examples, predictions) == {}
    assert task.confusion(examples, predictions) is None
    with pytest.raises(UserError, match=r"no row of .*t\.tsv has a column 'label' .*found: text"):
        task_of(tokenizer, {"name": "classification"}, {"train": train, "valid": test}).examples("valid")
    emptied = write(tmp_path / "t.tsv", "text\tlabel\nx\t\n")
    task = task_of(tokenizer, {"name": "regression"}, {"test": emptied})
    assert np.isnan(task.instances(task.examples("test"), train=False)[0].label).all()


def test_files_that_cannot_serve(tmp_path: Path, tokenizer: Tokenizer) -> None:
    one = write(tmp_path / "a.tsv", "text\tlabel\nx\ta\n")
    with pytest.raises(UserError, match=r"needs 2 labels or more, not \['a'\]"):
        task_of(tokenizer, {"name": "classification"}, {"train": one})
    unlabeled = write(tmp_path / "u.tsv", "text\tlabel\nx\t\n")
    with pytest.raises(UserError, match=r"needs 1 labels or more, not \[\]"):
        task_of(tokenizer, {"name": "classification", "multi_label": True}, {"train": unlabeled})
    with pytest.raises(UserError, match=r"set task\.labels or data\.train"):
        task_of(tokenizer, {"name": "classification"}, {"valid": one})
    with pytest.raises(UserError, match=r"set data\.format"):
        task_of(tokenizer, {"name": "classification"}, {"train": write(tmp_path / "a.dat", "x")})
    empty = write(tmp_path / "e.tsv", "text\tlabel\n")
    task = task_of(tokenizer, {"name": "classification", "labels": ["a", "b"]}, {"train": empty})
    with pytest.raises(UserError, match="no usable row"):
        task.examples("train")
    with pytest.raises(UserError, match=r'no data for "valid" .there is: train.: set data\.valid'):
        task.examples("valid")


def test_the_deciding_metric_can_be_chosen(tmp_path: Path, tokenizer: Tokenizer) -> None:
    settings = {"name": "classification", "labels": ["a", "b"]}
    assert task_of(tokenizer, settings | {"metric": "f1_macro"}).metric == "f1_macro"
    for wrong in ("f1", "loss"):
        with pytest.raises(UserError, match="accuracy, f1_macro, matthews"):
            task_of(tokenizer, settings | {"metric": wrong})
    with pytest.raises(UserError, match="squared_error_loss"):
        task_of(tokenizer, {"name": "regression", "metric": "squared_error_loss"})


def test_parts_of_the_training_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.tsv", "text\tlabel\n" + "".join(f"x{n}\t{n % 2}\n" for n in range(50)))
    data = {"train": path, "valid_fraction": 0.2, "test_fraction": 0.1}
    task = task_of(tokenizer, {"name": "classification"}, data)
    assert (task.splits, task.valid_splits, task.test_splits) == (("train", "valid", "test"), ("valid",), ("test",))
    parts = {split: [example.id for example in task.examples(split)] for split in task.splits}
    assert {split: len(ids) for split, ids in parts.items()} == {"train": 35, "valid": 10, "test": 5}
    assert sorted((name for ids in parts.values() for name in ids), key=int) == [str(n) for n in range(50)]
    assert [example.split for example in task.examples("valid")] == ["valid"] * 10
    again = task_of(tokenizer, {"name": "classification"}, data)
    assert [example.id for example in again.examples("test")] == parts["test"]
    other = task_of(tokenizer, {"name": "classification"}, data | {"split_seed": 1})
    assert [example.id for example in other.examples("test")] != parts["test"]
    with pytest.raises(UserError, match="leaves none for valid"):
        task_of(tokenizer, {"name": "classification"}, {"train": path, "valid_fraction": 0.001}).examples("train")


def test_restored_tasks_predict_the_same(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.tsv", "text\tlabel\tother\nx\tyes\tz\ny\tno\tz\n")
    data = {"columns": {"text_pair": "other"}}
    task = task_of(tokenizer, {"name": "classification", "max_length": 16}, {"train": path, **data})
    restored = restore_task(task.describe(), tokenizer, TaskDataSettings(**data))
    assert (restored.labels, restored.head, restored.max_length) == (task.labels, task.head, 16)
    assert restored.describe() == task.describe()
    row = restored.example_from({"text": "The cat", "text_pair": "sat", "id": 7}, "line 1")
    assert (row.id, row.text, row.text_pair, row.split) == (7, "The cat", "sat", "predict")
    assert restored.example_from({"text": "a", "text_pair": "b", "id": None}, "line 2").id == "line 2"
    with pytest.raises(UserError, match='line 3 has no "text_pair"'):
        restored.example_from({"text": "a"}, "line 3")
    instances = restored.instances([row], train=False)
    assert instances[0].label.tolist() == [IGNORED]
    assert restored.predictions([row], instances, scores_for([1], 2))[0]["label"] == "yes"
    with pytest.raises(UserError, match="does not describe a task"):
        restore_task({"settings": {"name": "nothing"}}, tokenizer)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"txt": "x"}, 'line 3 has no "text" .found: txt.'),
        ({"text": 3}, 'line 3 holds 3 under "text"'),
        ({"text": "\ud800"}, "half of a surrogate pair"),
        ({"text": "x", "text_pair": "y"}, 'line 3 has "text_pair", but the task is on single texts'),
        ({"text": "x", "id": [1]}, r'line 3 holds \[1\] under "id"'),
        ({"text": "x", "id": True}, 'line 3 holds true under "id"'),
    ],
)
def test_bad_rows_of_a_stream(tokenizer: Tokenizer, row: dict, reason: str) -> None:
    task = task_of(tokenizer, {"name": "classification", "labels": ["a", "b"]})
    with pytest.raises(UserError, match=reason):
        task.example_from(row, "line 3")


@pytest.mark.parametrize(
    ("name", "content", "data", "reason"),
    [
        ("a.jsonl", '{"text": "x", "label": "a"', {}, "a.jsonl line 1: "),
        ("a.tsv", "text\tlable\nx\ta\n", {}, r"a\.tsv has a column 'label' \(found: text, lable\)"),
        ("a.tsv", b"text\tlabel\n\xe9\ta\n", {}, "line 2: it is not UTF-8 at character 1"),
        ("a.tsv", "text\tlabel\nx\ta\n", {"format": "race"}, "data.format race is for other tasks"),
    ],
)
def test_why_no_label_was_found(
    tmp_path: Path, tokenizer: Tokenizer, name: str, content: str | bytes, data: dict, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        task_of(tokenizer, {"name": "classification"}, {"train": write(tmp_path / name, content), **data})


@pytest.mark.parametrize(
    ("name", "columns", "unused"),
    [("classification", {"tag": 1}, "tag"), ("token_classification", {"text": "a"}, "text"), ("cola", {"id": 0}, None)],
)
def test_columns_that_mean_nothing(tokenizer: Tokenizer, name: str, columns: dict, unused: str | None) -> None:
    what = "columns" if unused is None else rf"columns\.{unused}"
    with pytest.raises(UserError, match=rf'data\.{what} means nothing to the task "{name}"'):
        task_of(tokenizer, {"name": name}, {"columns": columns})
