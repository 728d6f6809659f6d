"""Fine-tuned models on files and streams, by the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from megatron_bert.cli import main
from megatron_bert.finetuning.finetune import finetune
from megatron_bert.finetuning.inference import evaluate_files, predict_stream
from megatron_bert.finetuning.results import read_results
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
    assert others == [{}, {}]


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
    (tmp_path / "rows.jsonl").write_text('{"text": "w1 w2"}\n{"words": 3}\nno JSON\n[1]\n', encoding="utf-8")
    command = ["predict", str(trained / "run"), "--input", str(tmp_path / "rows.jsonl"), "--device", "cpu"]
    target = tmp_path / "answers.jsonl"
    assert main([*command, "--output", str(target), "--on-bad-row", "skip"]) == 0
    found = [json.loads(line) for line in target.open(encoding="utf-8")]
    assert ["error" in row for row in found] == [False, True, True, True]
    assert "line 2" in found[1]["error"]
    assert "3 rows could not be read" in capsys.readouterr().err

    assert main([*command, "--output", str(tmp_path / "other.jsonl")]) == 2
    assert "line 2" in capsys.readouterr().err
    assert not list(tmp_path.glob("other*")), "nothing half-written"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["predict", "nowhere"], "holds no task.json"),
        (["evaluate", "{run}"], "no file to evaluate on"),
        (["evaluate", "{run}", "training.steps=3"], "no setting of the data"),
        (["evaluate", "{run}", "data.test=nowhere.jsonl"], "nowhere.jsonl"),
        (["evaluate", "{run}", "data.tset=x.jsonl"], "tset"),
        (["predict", "{run}", "--input", "nowhere.jsonl"], "cannot open nowhere.jsonl"),
        (["predict", "{run}", "--batch-size", "0"], "give 1 or more"),
    ],
)
def test_mistakes(trained: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument.replace("{run}", str(trained / "run")) for argument in arguments]) == 2
    assert expected in capsys.readouterr().err
