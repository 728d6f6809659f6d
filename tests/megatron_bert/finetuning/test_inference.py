# SPDX-License-Identifier: Apache-2.0
"""Fine-tuned models on files and streams, by the command line."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bert.cli import main
from megatron_bert.finetuning.finetune import finetune
from megatron_bert.finetuning.inference import evaluate_files, predict_stream
from megatron_bert.finetuning.results import read_results
from megatron_bert.finetuning.saved import load_task
from megatron_bert.tasks.settings import TaskDataSettings
from parallel.errors import UserError
from parallel.whole_files import write_json
from tests.megatron_bert.finetuning.support import join_world, make_run
from tests.worlds import run_world


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inference")
    finetune(make_run(folder, training__steps=6))
    return folder


def predictions(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "predictions_valid.jsonl").open(encoding="utf-8")]


def test_evaluate_gives_the_scores_of_the_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", str(trained / "run"), f"data.valid={trained / 'valid.jsonl'}", "--output", str(tmp_path)]
    assert main([*arguments, "--device", "cpu", "--batch-size", "7"]) == 0
    assert "40 examples" in capsys.readouterr().out
    expected, found = read_results(trained / "run"), read_results(tmp_path)
    assert expected is not None
    assert found is not None
    assert found["splits"]["valid"] == pytest.approx(expected["splits"]["valid"], rel=1e-5)
    for mine, theirs in zip(predictions(tmp_path), predictions(trained / "run"), strict=True):
        assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-6)


def _scores(trained: Path) -> dict[str, dict[str, float]]:
    overrides = [f"data.valid={trained / 'valid.jsonl'}"]
    return evaluate_files(trained / "run", overrides, output=None, batch_size=6, device="cpu")


def _scores_of_rank(trained: Path) -> dict[str, dict[str, float]]:
    join_world()
    return _scores(trained)


def test_evaluate_on_three_ranks(trained: Path) -> None:
    alone = _scores(trained)
    first, *others = run_world(3, _scores_of_rank, trained)
    assert first["valid"] == pytest.approx(alone["valid"], rel=1e-5)
    assert others == [first, first]


def _failure_of_rank(trained: Path, output: Path) -> str:
    join_world()
    (output / "predictions_valid.jsonl").mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError) as caught:
        evaluate_files(
            trained / "run", [f"data.valid={trained / 'valid.jsonl'}"], output=output, batch_size=6, device="cpu"
        )
    return str(caught.value)


def test_what_rank_0_cannot_write_ends_all_ranks(trained: Path, tmp_path: Path) -> None:
    first, second = run_world(2, _failure_of_rank, trained, tmp_path)
    assert "predictions_valid.jsonl: Is a directory" in first
    assert second == first


def test_settings_of_the_data_are_merged_with_those_of_training(trained: Path, tmp_path: Path) -> None:
    """``data.columns.text`` leaves ``data.columns.id`` as it was."""
    renamed = (trained / "valid.jsonl").read_text(encoding="utf-8").replace('"text"', '"body"')
    (tmp_path / "valid.jsonl").write_text(renamed, encoding="utf-8")
    overrides = [f"data.valid={tmp_path / 'valid.jsonl'}", "data.columns.text=body"]
    found = evaluate_files(trained / "run", overrides, output=tmp_path / "out", batch_size=6, device="cpu")
    assert found["valid"] == pytest.approx(_scores(trained)["valid"], rel=1e-5)
    assert [row["id"] for row in predictions(tmp_path / "out")] == [row["id"] for row in predictions(trained / "run")]


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for the classes 1 and 0, from a table with columns of its own."""
    folder = tmp_path_factory.mktemp("sentiment")
    settings = make_run(folder, training__steps=2)
    rows = "".join(f"w{30 + 10 * (number % 2)} w{number}\t{number % 2}\n" for number in range(16))
    (folder / "train.tsv").write_text(rows, encoding="utf-8")
    (folder / "test.tsv").write_text("sentence\tlabel\n" + rows, encoding="utf-8")
    data = {"train": folder / "train.tsv", "header": False, "columns": {"text": 0, "label": 1}}
    task = settings.task.model_copy(update={"labels": ["1", "0"], "metric": "f1_macro"})
    finetune(settings.model_copy(update={"data": TaskDataSettings.model_validate(data), "task": task}))
    return folder


class TestAnotherName:
    """``task.name`` for a model fine-tuned here: settings that only its own task has do not stand in the way."""

    def scores(self, folder: Path, model: Path, file: str, *overrides: str) -> Any:
        given = [f"data.test={folder / file}", *overrides]
        return evaluate_files(model, given, output=None, batch_size=6, device="cpu")["test"]

    def test_the_files_and_metrics_of_glue(self, sentiment: Path) -> None:
        expected = self.scores(sentiment, sentiment / "run", "train.tsv")
        found = self.scores(sentiment, sentiment / "run", "test.tsv", "task.name=SST-2")
        assert found == pytest.approx({name: expected[name] for name in ("loss", "accuracy")}, rel=1e-5)
        assert load_task(sentiment / "run", task={"name": "sst2"}).task.labels == ("0", "1")

    def test_back_to_a_plain_classification(self, sentiment: Path, tmp_path: Path) -> None:
        """Whose classes are those of the model, as there is no training file to find them in."""
        shutil.copytree(sentiment / "run" / "model", tmp_path / "model")
        described = load_task(sentiment / "run", task={"name": "sst2"}).task.describe()
        write_json(tmp_path / "model" / "task.json", described | {"columns": {}})
        columns = ("task.name=classification", "data.columns.text=sentence")
        found = self.scores(sentiment, tmp_path / "model", "test.tsv", *columns)
        expected = self.scores(sentiment, sentiment / "run", "train.tsv")
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("mnli", "fine-tuned for the classes 1, 0, but the task has contradiction, entailment, neutral"),
            ("stsb", "fine-tuned for single_label_classification, but the task is regression"),
            ("token_classification", "is a MegatronBertForSequenceClassification: give a task with such a head"),
            ("sst3", 'task name "sst3" is unknown'),
        ],
    )
    def test_what_does_not_fit(self, sentiment: Path, name: str, expected: str) -> None:
        with pytest.raises(UserError, match=expected):
            self.scores(sentiment, sentiment / "run", "test.tsv", f"task.name={name}")

    def test_what_the_user_gives_must_mean_something(self, sentiment: Path) -> None:
        with pytest.raises(UserError, match=r'data\.header means nothing to the task "sst2"'):
            self.scores(sentiment, sentiment / "run", "test.tsv", "task.name=sst2", "data.header=false")


def test_a_column_of_labels_that_is_not_there(trained: Path) -> None:
    overrides = [f"data.test={trained / 'valid.jsonl'}", "data.columns.label=tone"]
    with pytest.raises(UserError, match=r"data\.columns\.label is tone, but no row of the test file has that"):
        evaluate_files(trained / "run", overrides, output=None, batch_size=6, device="cpu")


class TestSeveralRuns:
    def runs(self, trained: Path, folder: Path, **summary: Any) -> Path:
        for name in ("seed_1", "seed_2"):
            shutil.copytree(trained / "run" / "model", folder / name / "model")
        write_json(folder / "results.json", {"runs": {"seed_1": {}, "seed_2": {}}} | summary)
        return folder

    def test_the_best_is_taken(self, trained: Path, tmp_path: Path) -> None:
        folder = self.runs(trained, tmp_path, best={"name": "seed_2", "score": 0.5})
        assert load_task(folder).directory == folder / "seed_2" / "model"

    def test_without_a_best_one(self, trained: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no best one: give one of seed_1, seed_2"):
            load_task(self.runs(trained, tmp_path, best=None))

    def test_damaged_summary(self, trained: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"results\.json is damaged"):
            load_task(self.runs(trained, tmp_path, best="seed_1"))


def test_predict_answers_in_order(trained: Path) -> None:
    """However rows are batched."""
    lines = (trained / "valid.jsonl").read_text(encoding="utf-8").splitlines()
    expected = predictions(trained / "run")
    for batch_size in (1, 8, 64):
        answers = io.StringIO()
        rows = io.StringIO("\ufeff" + "\r\n".join([*lines[:20], "", *lines[20:]]))
        assert predict_stream(trained / "run" / "model", rows, answers, batch_size=batch_size, device="cpu") == 0
        found = [json.loads(line) for line in answers.getvalue().splitlines()]
        assert [row["id"] for row in found] == [row["id"] for row in expected]
        for mine, theirs in zip(found, expected, strict=True):
            assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-6)


def test_predict_skips_bad_rows(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "w1 w2"}\n{"id": 8, "words": 3}\nno JSON\n[1]\n', encoding="utf-8")
    command = ["predict", str(trained / "run"), "--input", str(tmp_path / "rows.jsonl"), "--device", "cpu"]
    target = tmp_path / "answers.jsonl"
    assert main([*command, "--output", str(target), "--on-bad-row", "skip"]) == 0
    found = [json.loads(line) for line in target.open(encoding="utf-8")]
    assert ["error" in row for row in found] == [False, True, True, True]
    assert "line 2" in found[1]["error"]
    assert [row.get("id") for row in found] == ["line 1", 8, "line 3", "line 4"]
    assert "3 rows have no answer" in capsys.readouterr().err

    other = tmp_path / "other.jsonl"
    assert main([*command, "--output", str(other)]) == 2
    assert "line 2" in capsys.readouterr().err
    assert [json.loads(line) for line in other.open(encoding="utf-8")] == found[:1], "what came before is answered"
    assert len(list(tmp_path.iterdir())) == 3, "nothing is left half-written"


#: Rows that are not JSON objects in UTF-8, and what their answers say.
MALFORMED = {
    b'{"text": "caf\xe9"}': "not UTF-8 at character 14",
    rb'{"text": "w1", "id": "\ud800"}': "half of a surrogate pair",
    rb'{"text": "w1", "\udfff": 1}': "half of a surrogate pair",
    b"[" * 100_000: "not JSON",
    b'{"text": "w1\0"}': "NUL",
}


@pytest.mark.parametrize("piped", [False, True])
def test_malformed_rows_are_answered(
    trained: Path, tmp_path: Path, piped: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = b"\n".join([*MALFORMED, b'{"text": "w1", "id": "good"}'])
    (tmp_path / "rows.jsonl").write_bytes(content)
    command = ["predict", str(trained / "run"), "--device", "cpu", "--output", str(tmp_path / "answers.jsonl")]
    if piped:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    else:
        command += ["--input", str(tmp_path / "rows.jsonl")]
    assert main([*command, "--on-bad-row", "skip"]) == 0
    *bad, good = [json.loads(line) for line in (tmp_path / "answers.jsonl").open(encoding="utf-8")]
    assert good["id"] == "good"
    for number, (answer, reason) in enumerate(zip(bad, MALFORMED.values(), strict=True), 1):
        assert answer["error"].startswith(f"line {number}: ")
        assert reason in answer["error"]
    if not piped:
        assert main(command) == 2
        assert "line 1: it is not UTF-8" in capsys.readouterr().err


class FullDisk(io.StringIO):
    """Standard output that takes nothing."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_answers_that_cannot_be_written(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", FullDisk())
    command = ["predict", str(trained / "run"), "--input", str(trained / "valid.jsonl"), "--device", "cpu"]
    assert main(command) == 2
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["predict", "--output", "{here}"], "which is not a regular file"),
        (["predict", "--output", "{here}/none/answers.jsonl"], "none/answers.jsonl cannot be written (No such file"),
        (["predict", "--input", "{here}"], "Is a directory"),
        (["evaluate", "--output", "{here}/file"], "file is a file: give a directory"),
        (["evaluate", "--output", "{here}/file/below"], "give a directory"),
    ],
)
def test_paths_are_checked_before_the_model_is_loaded(
    tmp_path: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    command, *options = [argument.replace("{here}", str(tmp_path)) for argument in arguments]
    assert main([command, "no_model", *options]) == 2
    assert expected in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_no_such_device(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([command, "no_model", "--device", "cuda"]) == 2
    assert "--device is cuda" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["predict", "nowhere"], "nowhere is not there: check the path"),
        (["evaluate", "{run}"], "no file to evaluate on"),
        (["evaluate", "{run}", "training.steps=3"], "not a setting of the data"),
        (["evaluate", "{run}", "data.test=nowhere.jsonl"], "nowhere.jsonl"),
        (["evaluate", "{run}", "data.tset=x.jsonl"], "tset"),
        (["predict", "{run}", "--input", "nowhere.jsonl"], "nowhere.jsonl cannot be read (No such file"),
        (["predict", "{run}", "--batch-size", "0"], "give 1 or more"),
        (["predict", "{run}", "--wait", "1"], "give --stream too"),
        (["predict", "{run}", "--stream", "--wait", "-1"], "--wait is -1.0: give seconds"),
        (["predict", "{run}", "--stream", "--wait", "nan"], "--wait is nan"),
    ],
)
def test_mistakes(trained: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument.replace("{run}", str(trained / "run")) for argument in arguments]) == 2
    assert expected in capsys.readouterr().err
