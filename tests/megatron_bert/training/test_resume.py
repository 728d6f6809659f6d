# SPDX-License-Identifier: Apache-2.0
"""A run that was stopped goes on as if it had not been."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.training.metrics_file import METRICS_FILE, read_metrics
from megatron_bert.training.pretrain import pretrain
from megatron_bert.training.trainer import Trainer
from parallel.checkpoint import latest_checkpoint, whole_checkpoints
from parallel.errors import UserError
from tests.megatron_bert.training.runs import STEPS, assert_same_checkpoint, rows, run_settings
from tests.worlds import run_world


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the first step to the last, with a checkpoint every two and an evaluation every three."""
    run = tmp_path_factory.mktemp("whole")
    pretrain(run_settings(data, run, checkpoint__every=2, training__evaluate_every=3))
    return run


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Let this process get a signal during one step."""
    original = Trainer.train_step

    def train_step(self: Trainer, *args: Any) -> Any:
        if self.step == step - 1:
            signal.raise_signal(number)
        return original(self, *args)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def start_loaders() -> None:
    """Start the server that loader processes are forked from, with torch loaded: they are ready at once."""
    run_world(1, id, None)


@pytest.mark.parametrize(
    ("asynchronous", "workers", "precision"),
    [(False, 0, "float32"), (True, 0, "float32"), (True, 2, "float32"), (False, 0, "bfloat16")],
    ids=["synchronous", "asynchronous", "loader processes", "bfloat16"],
)
def test_equal_to_the_last_bit(
    data: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asynchronous: bool,
    workers: int,
    precision: str,
) -> None:
    if workers:
        start_loaders()
    options: dict[str, Any] = {"training__evaluate_every": 3, "precision__compute": precision}
    if precision != "float32":
        whole = tmp_path / "whole"
        pretrain(run_settings(data, whole, **options))
    run = tmp_path / "run"
    settings = run_settings(data, run, checkpoint__asynchronous=asynchronous, data__workers=workers, **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        pretrain(settings)
    newest = latest_checkpoint(run / "checkpoints")
    assert newest is not None
    assert newest.name == "step_00000004"
    assert "stopped by SIGTERM after step 4: the same command goes on from there" in capsys.readouterr().out
    assert [row["step"] for row in rows(run) if "loss" in row] == [1, 2, 3, 4]

    pretrain(settings)
    said = capsys.readouterr().out
    assert f"resuming from {newest}" in said
    assert f"training data {data / 'corpus'}: " in said
    assert f"the {STEPS - 4} steps to come are " in said
    assert f"held-out data {data / 'corpus'}: " in said
    assert rows(run) == rows(whole)
    last = f"checkpoints/step_{STEPS:08d}"
    assert_same_checkpoint(run / last, whole / last)


class TestAnEarlierCheckpoint:
    def test_later_ones_are_refused_until_they_are_removed(self, data: Path, whole: Path, tmp_path: Path) -> None:
        """Else the next start would go on from those, which the run has left behind."""
        run = tmp_path / "run"
        shutil.copytree(whole, run)
        earlier = run / "checkpoints" / "step_00000002"
        settings = run_settings(
            data, run, checkpoint__resume=str(earlier), checkpoint__keep=1, training__evaluate_every=3
        )
        before = (run / "config.yaml").read_text(encoding="utf-8")
        with pytest.raises(
            UserError, match=r"step_00000002, but .* holds later .*: step_00000004, step_00000006; remove them"
        ):
            pretrain(settings)
        assert (run / "config.yaml").read_text(encoding="utf-8") == before
        for step in (4, 6):
            shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
        pretrain(settings)
        assert rows(run) == rows(whole)  # no step occurs twice, though the later ones were there already
        last = f"checkpoints/step_{STEPS:08d}"
        assert_same_checkpoint(run / last, whole / last)

    def test_the_same_command_goes_on_from_its_own(
        self,
        data: Path,
        whole: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """A launcher that starts it again repeats no step; with other settings it is another command."""
        earlier, run = whole / "checkpoints" / "step_00000002", tmp_path / "run"
        options: dict[str, Any] = {"checkpoint__resume": str(earlier), "training__evaluate_every": 3}
        with monkeypatch.context() as patch:
            stop_after(patch, 4)
            pretrain(run_settings(data, run, **options))
        with pytest.raises(UserError, match=r"set checkpoint\.resume=auto to go on"):
            pretrain(run_settings(data, run, **options, learning_rate__peak=1e-3))
        pretrain(run_settings(data, run, **options))
        assert f"resuming from {run / 'checkpoints' / 'step_00000004'}" in capsys.readouterr().out
        assert rows(run) == [row for row in rows(whole) if row["step"] > 2]
        last = f"checkpoints/step_{STEPS:08d}"
        assert_same_checkpoint(run / last, whole / last)

    def test_the_one_it_began_with_may_be_gone(
        self, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only the newest is kept, and the one that the command names was of the same run directory."""
        run = tmp_path / "run"
        shutil.copytree(whole, run)
        earlier = run / "checkpoints" / "step_00000002"
        for step in (4, 6):
            shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
        options: dict[str, Any] = {
            "checkpoint__resume": str(earlier),
            "checkpoint__keep": 1,
            "training__evaluate_every": 3,
        }
        with monkeypatch.context() as patch:
            stop_after(patch, 4)
            pretrain(run_settings(data, run, **options))
        assert not earlier.exists()
        pretrain(run_settings(data, run, **options))
        assert rows(run) == rows(whole)

    def test_earlier_ones_of_the_directory_are_no_matter(self, data: Path, whole: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        pretrain(run_settings(data, run, training__steps=3))
        later = whole / "checkpoints" / "step_00000004"
        pretrain(run_settings(data, run, checkpoint__resume=str(later), training__evaluate_every=3))
        assert latest_checkpoint(run / "checkpoints") == run / "checkpoints" / f"step_{STEPS:08d}"


def test_from_the_start(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an earlier command left is neither gone on from nor lost; the same command goes on from its own."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    settings = run_settings(data, run, checkpoint__resume="none", training__evaluate_every=3)
    with pytest.raises(UserError, match=r"resume is none, but .*checkpoints holds later checkpoints .*remove them"):
        pretrain(settings)
    assert latest_checkpoint(run / "checkpoints") == run / "checkpoints" / f"step_{STEPS:08d}"
    shutil.rmtree(run / "checkpoints")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        pretrain(settings)
    assert rows(run) == [row for row in rows(whole) if row["step"] <= 4]
    pretrain(settings)
    assert f"resuming from {run / 'checkpoints' / 'step_00000004'}" in capsys.readouterr().out
    assert rows(run) == rows(whole)


def test_nothing_left_to_do(data: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    pretrain(run_settings(data, whole, training__evaluate_every=3))
    out = capsys.readouterr().out
    assert f"has reached training.steps {STEPS}: nothing left to do" in out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_longer_training_goes_on(data: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    pretrain(run_settings(data, run, training__steps=STEPS + 1))
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, STEPS + 2))


def test_time_limit(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(run_settings(data, tmp_path / "run", training__max_minutes=1e-9))
    assert "stopped by training.max_minutes after step 1" in capsys.readouterr().out
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "step_00000001"


def test_the_best_are_kept_across_a_stop_and_what_saves_cost_is_reported(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = (3.0, 1.0, 2.5, 2.0, 4.0, 5.0)
    seen: list[float] = []

    def evaluate(*_: Any) -> dict[str, float]:
        seen.append(losses[len(seen)])
        return {"mlm_loss": seen[-1], "sop_loss": 0.5}

    monkeypatch.setattr("megatron_bert.training.pretraining.evaluate", evaluate)
    settings = run_settings(
        data, tmp_path, checkpoint__every=5, checkpoint__keep=1, checkpoint__keep_best=2, training__evaluate_every=1
    )
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        pretrain(settings)
    pretrain(settings)
    assert len(seen) == STEPS
    assert list(whole_checkpoints(tmp_path / "checkpoints")) == [2, 4, 6]
    saves = [row for row in read_metrics(tmp_path / METRICS_FILE) if "checkpoint_bytes" in row]
    assert {1, 2, 3, 4, 5, 6} == {row["step"] for row in saves}
    assert all(0 < row["checkpoint_stall_seconds"] <= row["checkpoint_seconds"] for row in saves)


def test_the_best_cannot_be_kept_without_held_out_data(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"keep_best is 2, but no data are held out .*: set data\.valid or data\.split"):
        pretrain(run_settings(data, tmp_path, checkpoint__keep_best=2, data__valid=None, data__split="100,0,0"))
