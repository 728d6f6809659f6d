# SPDX-License-Identifier: Apache-2.0
"""Reports: rows, console lines, TensorBoard, and the picture of the curves."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_bert.config_sections import LoggingSettings
from megatron_bert.training import heartbeat
from megatron_bert.training.heartbeat import HEARTBEAT_FILE
from megatron_bert.training.metrics import Report
from megatron_bert.training.metrics_file import METRICS_FILE, read_metrics
from parallel.errors import UserError
from parallel.hosts import host_name

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


def test_a_directory_in_place_of_the_metrics(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl is a directory, but .*: move it away"):
        report(tmp_path)


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


BROKEN = [b"{", b"\xff\xfe\x00", b"[" * 100_000, b"null", b'{"step": "1"}', b'{"loss": 1.0}']


def test_broken_lines_cost_only_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / METRICS_FILE
    lines = [line for step in range(1, 7) for line in (json.dumps(row(step)).encode(), BROKEN[step - 1])]
    path.write_bytes(b"\n".join([*lines, b""]))
    assert [found["step"] for found in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    with report(tmp_path, start=5) as one:
        one.step(row(6))
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()] == [1, 2, 3, 4, 5, 6]
    assert "warning: 6 lines of metrics.jsonl could not be read, and are left out" in capsys.readouterr().out


def test_rows_are_strict_json(tmp_path: Path) -> None:
    with report(tmp_path) as one:
        one.step(row(1, grad_norm=float("inf")))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    found = json.loads((tmp_path / METRICS_FILE).read_text(encoding="utf-8"), parse_constant=refuse)
    assert "grad_norm" not in found


@pytest.mark.parametrize("removed", [METRICS_FILE, "tensorboard", "."])
def test_what_is_removed_on_the_way_begins_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], removed: str
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with report(run_dir, LoggingSettings(progress=False)) as one:
        one.step(row(1))
        target = run_dir / removed
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()
        one.step(row(2))
    lost = removed != "tensorboard"
    assert [found["step"] for found in read_metrics(run_dir / METRICS_FILE)] == ([2] if lost else [1, 2])
    assert ("was removed or replaced" in capsys.readouterr().out) == lost
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in events] == ([1, 2] if removed == METRICS_FILE else [2])


def beats(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / HEARTBEAT_FILE).read_text(encoding="utf-8"))
    return found


def test_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.0)
    with report(tmp_path, start=3) as one:
        assert beats(tmp_path)["state"] == "training"
        one.step(row(4))
        one.advance()
        found = beats(tmp_path)
        assert abs(found.pop("time") - time.time()) < 600
        assert found == {
            "state": "training", "step": 4, "steps": 10, "loss": 2.5 / 4, "host": host_name(), "pid": os.getpid()
        }  # fmt: skip
        one.doing("evaluating")
        assert beats(tmp_path)["state"] == "evaluating"
    assert beats(tmp_path)["state"] == "done"
    with report(tmp_path) as one:
        one.stopped = True
    assert beats(tmp_path)["state"] == "stopped"
    with pytest.raises(ArithmeticError), report(tmp_path):
        raise ArithmeticError
    assert beats(tmp_path)["state"] == "failed"


def test_a_heartbeat_is_not_written_at_every_step(tmp_path: Path) -> None:
    with report(tmp_path) as one:
        before = (tmp_path / HEARTBEAT_FILE).stat()
        one.advance()
        assert (tmp_path / HEARTBEAT_FILE).stat() == before


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
