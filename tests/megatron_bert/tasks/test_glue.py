# SPDX-License-Identifier: Apache-2.0
"""GLUE: official files in, official files out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.tasks.registry import restore_task
from megatron_bert.tasks.table import GLUE_NAMES
from parallel.errors import UserError

from .glue_samples import MRPC, table, write_glue
from .support import letter_tokenizer, scores_for, task_of, write

EXPECTED = {
    "cola": (["1", "0"], False, "matthews"),
    "sst2": (["1", "0"], False, "accuracy"),
    "mrpc": (["1", "0"], True, "accuracy_f1"),
    "qqp": (["1", "0"], True, "accuracy_f1"),
    "stsb": ([5.0, 0.25], True, "pearson_spearman"),
    "mnli": (["neutral", "contradiction"], True, "accuracy"),
    "qnli": (["entailment", "not_entailment"], True, "accuracy"),
    "rte": (["not_entailment", "entailment"], True, "accuracy"),
    "wnli": (["1", "0"], True, "accuracy"),
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return letter_tokenizer(tmp_path)


@pytest.mark.parametrize("name", GLUE_NAMES)
def test_official_files(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    task = task_of(tokenizer, {"name": name}, {"directory": write_glue(tmp_path / "glue")})
    labels, pair, metric = EXPECTED[name]
    assert task.metric == metric
    examples = task.examples("train")
    found = [task.labels[int(e.target[0])] if task.labels else e.target[0] for e in examples]
    assert found == labels
    # Quotes and commas are text, not quoting.
    assert {example.text for example in examples} == {'"one" a'}
    assert {example.text_pair for example in examples} == {"b, two" if pair else None}
    instances = task.instances(examples, train=True)
    assert [instance.example for instance in instances] == [0, 1]
    assert task.head.outputs == (3 if name == "mnli" else 1 if name == "stsb" else 2)
    for split in task.test_splits:
        tested = task.examples(split)
        assert [(e.id, e.text, e.target) for e in tested] == [("5", "b", ()), ("6", "b" if pair else "c", ())]
        assert [e.text_pair for e in tested] == (["c", "c"] if pair else [None, None])


def test_splits_of_mnli(tmp_path: Path, tokenizer: Tokenizer) -> None:
    task = task_of(tokenizer, {"name": "mnli"}, {"directory": write_glue(tmp_path / "glue") / "MNLI"})
    assert task.valid_splits == ("valid_matched", "valid_mismatched")
    assert task.test_splits == ("test_matched", "test_mismatched", "test_diagnostic")
    assert task.labels == ("contradiction", "entailment", "neutral")
    assert [task.examples(split)[0].target for split in task.valid_splits] == [(1.0,), (2.0,)]
    assert task.splits[0] == "train"


@pytest.mark.parametrize("name", GLUE_NAMES)
def test_submissions(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    task = task_of(tokenizer, {"name": name}, {"directory": write_glue(tmp_path / "glue")})
    files = {}
    for split in task.test_splits:
        examples = task.examples(split)
        instances = task.instances(examples, train=False)
        logits = scores_for([1, 0], task.head.outputs) if task.labels else [np.array([7.0]), np.array([1.23456])]
        predictions = task.predictions(examples, instances, logits)
        for path in task.write_submission(examples, predictions, tmp_path / "out"):
            files[path.name] = path.read_text()
    first, second = (task.labels[1], task.labels[0]) if task.labels else ("5.000", "1.235")
    names = {"cola": ["CoLA"], "sst2": ["SST-2"], "stsb": ["STS-B"], "mnli": ["MNLI-m", "MNLI-mm", "AX"]}
    expected = [f"{n}.tsv" for n in names.get(name, [name.upper()])]
    assert files == dict.fromkeys(expected, f"index\tprediction\n5\t{first}\n6\t{second}\n")


def test_labeled_splits_are_no_submission(tmp_path: Path, tokenizer: Tokenizer) -> None:
    task = task_of(tokenizer, {"name": "rte"}, {"directory": write_glue(tmp_path / "glue")})
    examples = task.examples("valid")
    predictions = task.predictions(examples, task.instances(examples, train=False), scores_for([0, 1], 2))
    assert task.write_submission(examples, predictions, tmp_path / "out") == []


def test_files_of_mnli_that_are_given_one_by_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The file's name says which of the leaderboard's files it is for."""
    directory = write_glue(tmp_path / "glue")
    path = next(directory.rglob("test_mismatched.tsv"))
    task = task_of(tokenizer, {"name": "mnli"}, {"test": path})
    examples = task.examples("test")
    predictions = task.predictions(examples, task.instances(examples, train=False), scores_for([1, 0], 3))
    assert [found.name for found in task.write_submission(examples, predictions, tmp_path / "out")] == ["MNLI-mm.tsv"]


def test_a_labeled_file_of_cola_to_test_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Its development file has no header, whatever it is used for."""
    path = next(write_glue(tmp_path / "glue").rglob("CoLA/dev.tsv"))
    task = task_of(tokenizer, {"name": "cola"}, {"test": path})
    given = task_of(tokenizer, {"name": "cola"}, {"valid": path}).examples("valid")
    assert [(e.text, e.target) for e in task.examples("test")] == [(e.text, e.target) for e in given]


def predicted(task, examples, classes):
    return task.predictions(examples, task.instances(examples, train=False), scores_for(classes, 2))


def test_metrics_follow_glue(tmp_path: Path, tokenizer: Tokenizer) -> None:
    true, given = [1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 1]
    rows = table(MRPC, *([str(n), "1", "2", "a", "b"] for n in true))
    task = task_of(tokenizer, {"name": "mrpc"}, {"train": write(tmp_path / "a.tsv", rows)})
    examples = task.examples("train")
    accuracy, f1 = sklearn.metrics.accuracy_score(true, given), sklearn.metrics.f1_score(true, given)
    assert task.metrics(examples, predicted(task, examples, given)) == {
        "accuracy_f1": pytest.approx((accuracy + f1) / 2),
        "accuracy": pytest.approx(accuracy),
        "f1": pytest.approx(f1),
    }
    rows = table(*(["x", str(n), "", "a"] for n in true))
    task = task_of(tokenizer, {"name": "cola"}, {"train": write(tmp_path / "b.tsv", rows)})
    examples = task.examples("train")
    assert task.metrics(examples, predicted(task, examples, given)) == {
        "matthews": pytest.approx(sklearn.metrics.matthews_corrcoef(true, given)),
        "accuracy": pytest.approx(accuracy),
    }
    scores, said = [0.0, 2.5, 5.0, 1.0], [1.0, 1.5, 4.0, 2.0]
    rows = table(["index", "sentence1", "sentence2", "score"], *(["0", "a", "b", str(x)] for x in scores))
    task = task_of(tokenizer, {"name": "stsb"}, {"train": write(tmp_path / "c.tsv", rows)})
    examples = task.examples("train")
    logits = [np.array([x], dtype=np.float32) for x in said]
    found = task.metrics(examples, task.predictions(examples, task.instances(examples, train=False), logits))
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(scores, said).statistic)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(scores, said).statistic)
    assert found["pearson_spearman"] == pytest.approx((found["pearson"] + found["spearman"]) / 2)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_mrpc_as_microsoft_distributes_it(tmp_path: Path, tokenizer: Tokenizer, mark: bytes) -> None:
    rows = [["1", "1", "2", "a", "b"], ["0", "3", "4", "c", "d"], ["1", "5", "6", "e", "f"]]
    write(tmp_path / "m/msr_paraphrase_train.txt", mark + table(MRPC, *rows).replace("\n", "\r\n").encode())
    write(tmp_path / "m/msr_paraphrase_test.txt", mark + table(MRPC, *rows[:2]).encode())
    data = {"directory": tmp_path / "m"}
    assert task_of(tokenizer, {"name": "mrpc"}, data).splits == ("train", "test")
    write(tmp_path / "m/dev_ids.tsv", "3\t4\n")
    task = task_of(tokenizer, {"name": "mrpc"}, data)
    assert task.splits == ("train", "valid", "test")
    assert [e.text for e in task.examples("train")] == ["a", "e"]
    assert [e.text for e in task.examples("valid")] == ["c"]
    assert [(e.id, e.text, e.target) for e in task.examples("test")] == [("0", "a", (1.0,)), ("1", "c", (0.0,))]


def test_bad_rows_of_official_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.tsv", "x\t1\t\ta\nx\t1\ta\nx\t2\t\ta\nx\t0\t\tb\n")
    task = task_of(tokenizer, {"name": "cola"}, {"train": path, "on_bad_row": "skip"})
    assert [example.text for example in task.examples("train")] == ["a", "b"]
    assert task.bad_rows.count == 2
    assert "line 2: it has 3 columns, expected 4" in task.bad_rows.reasons[0]
    assert 'line 3: its label "2" is unknown (known: 0, 1)' in task.bad_rows.reasons[1]
    path = write(tmp_path / "b.tsv", "index\tquestion\tlabel\n0\ta\tentailment\n")
    with pytest.raises(UserError, match=r"has a column 'sentence' .found: index, question, label\): give a file"):
        task_of(tokenizer, {"name": "qnli"}, {"train": path}).examples("train")
    with pytest.raises(UserError, match=r"holds no file of QNLI, such as train\.tsv"):
        _ = task_of(tokenizer, {"name": "qnli"}, {"directory": tmp_path}).splits
    glue = write_glue(tmp_path / "glue")
    with pytest.raises(UserError, match=r"leave out data\.valid_fraction"):
        _ = task_of(tokenizer, {"name": "qnli"}, {"directory": glue, "valid_fraction": 0.5}).splits


@pytest.mark.parametrize("cell", ["-1", "", "-1.0"])
def test_test_files_may_say_that_a_label_is_unknown(tmp_path: Path, tokenizer: Tokenizer, cell: str) -> None:
    """As those of the Hugging Face hub do, instead of leaving the column out."""
    files = {
        "sst2": table(["sentence", "label"], ["a", cell], ["b", cell]),
        "qnli": table(["question", "sentence", "label"], ["a", "b", cell], ["c", "d", cell]),
        "stsb": table(["sentence1", "sentence2", "score"], ["a", "b", cell], ["c", "d", cell]),
        "cola": table(["x", cell, "", "a"], ["x", cell, "", "b"]),
    }
    for name, content in files.items():
        path = write(tmp_path / name / "t.tsv", content)
        task = task_of(tokenizer, {"name": name}, {"test": path, "valid": path})
        assert [e.target for e in task.examples("test")] == [(), ()]
        if name != "stsb" or not cell:
            with pytest.raises(UserError, match=r"line \d: its label"):
                task.examples("valid")


def test_submissions_of_several_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    directory = write_glue(tmp_path / "glue") / "MNLI"
    files = [directory / f"test_{part}.tsv" for part in ("mismatched", "matched")]
    task = task_of(tokenizer, {"name": "mnli"}, {"test": files})
    examples = task.examples("test")
    predictions = task.predictions(examples, task.instances(examples, train=False), scores_for([1, 0, 2, 2], 3))
    written = task.write_submission(examples, predictions, tmp_path / "out")
    assert {path.name: path.read_text().split()[2:] for path in written} == {
        "MNLI-m.tsv": ["5", "neutral", "6", "neutral"],
        "MNLI-mm.tsv": ["5", "entailment", "6", "contradiction"],
    }


def test_other_formats_are_recognized(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.tsv", "question,sentence,label\na,b,entailment\n")
    with pytest.raises(UserError, match="commas seem to separate its columns, where tabs were expected"):
        task_of(tokenizer, {"name": "qnli"}, {"train": path}).examples("train")
    with pytest.raises(UserError, match="1 columns, expected 4; commas seem to separate"):
        task_of(tokenizer, {"name": "cola"}, {"train": path}).examples("train")


def test_restored(tmp_path: Path, tokenizer: Tokenizer) -> None:
    glue = write_glue(tmp_path / "glue")
    for name in GLUE_NAMES:
        task = task_of(tokenizer, {"name": name}, {"directory": glue})
        restored = restore_task(task.describe(), tokenizer)
        assert (restored.labels, restored.head, restored.metric) == (task.labels, task.head, task.metric)
        assert restored.splits == ()
