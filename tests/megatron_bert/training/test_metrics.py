"""Reports: rows, console lines, TensorBoard, and the picture of the curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_bert.config import LoggingSettings
from megatron_bert.training.metrics import METRICS_FILE, Report, read_metrics

QUIET = LoggingSettings(tensorboard=False, progress=False)


def row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 2.5 / step,
        "mlm_loss": 2.0 / step,
        "sop_loss": 0.5 / step,
        "learning_rate": 1e-4,
        "grad_norm": 1.25,
        "loss_scale": None,
        "tokens_per_second": 12345.6,
        **more,
    }


def report(folder: Path, settings: LoggingSettings = QUIET, *, active: bool = True, start: int = 0) -> Report:
    return Report(folder, settings, active=active, start=start, steps=10)


def test_rows_and_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with report(tmp_path) as one:
        one.step(row(1))
        one.step(row(2, sop_loss=None, mfu=0.125))
        one.evaluation(2, {"mlm_loss": 1.5, "perplexity": 4.48169})
        one.say("a line")
    found = read_metrics(tmp_path / METRICS_FILE)
    assert found[0] == {name: value for name, value in row(1).items() if value is not None}
    assert "sop_loss" not in found[1]
    assert found[1]["mfu"] == 0.125
    assert found[2] == {"step": 2, "valid_mlm_loss": 1.5, "valid_perplexity": 4.48169}
    lines = capsys.readouterr().out.splitlines()
    start = (
        "step 1/10 | loss 2.5000 | mlm 2.0000 | sop 0.5000 | lr 1.00e-04 | grad norm 1.250 | 12,346 tokens/s | left "
    )
    assert lines[0].startswith(start)
    assert "| sop" not in lines[1]
    assert "| MFU 12.5% |" in lines[1]
    assert lines[2:] == ["step 2/10 | held out: mlm_loss 1.5000, perplexity 4.4817", "a line"]


def test_rows_are_there_at_once(tmp_path: Path) -> None:
    with report(tmp_path) as one:
        one.step(row(1))
        assert len(read_metrics(tmp_path / METRICS_FILE)) == 1


def test_resuming_drops_what_will_come_again(tmp_path: Path) -> None:
    with report(tmp_path) as one:
        for step in (1, 2, 3):
            one.step(row(step))
            one.evaluation(step, {"mlm_loss": 1.0})
    with report(tmp_path, start=2) as two:
        two.step(row(3))
    assert [found["step"] for found in read_metrics(tmp_path / METRICS_FILE)] == [1, 1, 2, 2, 3]


def test_a_line_cut_off_by_a_crash(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2))[:20], encoding="utf-8")
    assert [found["step"] for found in read_metrics(path)] == [1]
    with report(tmp_path, start=1) as one:
        one.step(row(2))
    assert [found["step"] for found in read_metrics(path)] == [1, 2]


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with report(tmp_path, active=False) as one:
        one.say("a line")
        one.advance()
        one.step(row(1))
        one.evaluation(1, {"mlm_loss": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with report(tmp_path, LoggingSettings(tensorboard=False, progress=True), start=4) as one:
        one.advance()
        assert one.bar.n == 5
    assert "/10" in capsys.readouterr().err


def test_tensorboard(tmp_path: Path) -> None:
    with report(tmp_path, LoggingSettings(progress=False)) as one:
        one.step(row(1))
        one.step(row(2))
        one.evaluation(2, {"mlm_loss": 1.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/loss", "train/grad_norm", "valid/mlm_loss"} <= set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.5), (2, 1.25)]
    assert [(event.step, event.value) for event in events.Scalars("valid/mlm_loss")] == [(2, 1.5)]
    with report(tmp_path, LoggingSettings(progress=False)) as another:
        another.step(row(1))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1], "a run that begins takes the place"
