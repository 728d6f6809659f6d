# SPDX-License-Identifier: Apache-2.0
"""After a spike of the loss a run returns to its last checkpoint and leaves out the data it spiked on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_bert.config import TrainingSettings
from megatron_bert.training.metrics import Report
from megatron_bert.training.pretrain import pretrain
from megatron_bert.training.pretraining import Pretraining
from megatron_bert.training.signals import StopRequest
from megatron_bert.training.spikes import Spikes
from parallel.checkpoint import read_state, whole_checkpoints
from parallel.errors import UserError
from tests.megatron_bert.training.layouts import BATCH, Case, make_trainer
from tests.megatron_bert.training.runs import assert_same_checkpoint, rows, run_settings
from tests.worlds import run_world


def bad_samples(patch: pytest.MonkeyPatch, bad: range) -> None:
    """Let the loss be a hundred times as high on some samples."""
    original = Pretraining.loss_sums

    def loss_sums(self: Pretraining, output: Any, batch: Any, tp: Any) -> Tensor:
        worse = any(int(number) in bad for number in batch.samples.unique())
        return original(self, output, batch, tp) * (100.0 if worse else 1.0)

    patch.setattr(Pretraining, "loss_sums", loss_sums)


SETTINGS: dict[str, Any] = {
    "training__steps": 10,
    "training__spike_threshold": 10.0,
    "training__spike_window": 3,
    "training__spike_steps": 1,
    "checkpoint__every": 2,
    "checkpoint__keep": 0,
}


def test_the_data_of_a_spike_are_left_out(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of 8 samples: the sixth spikes, and steps 5 and 6 are made again from sample 48 on."""
    bad_samples(monkeypatch, range(44, 46))
    run = tmp_path / "run"
    pretrain(run_settings(data, run, **SETTINGS, logging__tensorboard=True))
    said = capsys.readouterr().out
    assert f"returned to {run / 'checkpoints' / 'step_00000004'} without samples 32 to 47" in said
    found = rows(run)
    assert [row["step"] for row in found if "loss" in row] == list(range(1, 11))
    (note,) = [row for row in found if "spike_step" in row]
    assert (note["step"], note["spike_step"], note["skipped_samples"]) == (4, 6, 16)
    assert {row.get("skipped_samples") for row in found if row["step"] > 4 and "loss" in row} == {16}
    assert read_state(run / "checkpoints" / "step_00000010")["skipped_samples"] == 16

    stopped = tmp_path / "stopped"
    pretrain(run_settings(data, stopped, **{**SETTINGS, "training__steps": 7, "learning_rate__decay_steps": 10}))
    pretrain(run_settings(data, stopped, **{**SETTINGS, "learning_rate__decay_steps": 10}))
    assert [row for row in rows(stopped) if row.get("valid_mlm_loss") is None or row["step"] == 10] == found
    last = "checkpoints/step_00000010"
    assert_same_checkpoint(run / last, stopped / last)


def test_a_spike_that_comes_back_ends_the_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad_samples(monkeypatch, range(44, 1000))
    with pytest.raises(UserError, match=r"rose to .* after 2 return\(s\) to a checkpoint: go on from .*_00000004"):
        pretrain(run_settings(data, tmp_path, **SETTINGS, training__spike_returns=2))
    assert list(whole_checkpoints(tmp_path / "checkpoints")) == [2, 4]


def test_without_a_checkpoint_it_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_samples(monkeypatch, range(28, 29))
    pretrain(run_settings(data, tmp_path, **{**SETTINGS, "checkpoint__every": 100, "training__steps": 5}))
    assert "there is no checkpoint to return to: training goes on" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [1, 2, 3, 4, 5]


def test_nothing_to_return_to_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"spike_threshold is 10\.0, but checkpoint\.every is 0"):
        pretrain(run_settings(data, tmp_path, **{**SETTINGS, "checkpoint__every": 0}))


def settings(**changes: Any) -> TrainingSettings:
    values = {"run_dir": Path("run"), "global_batch_size": 8, "micro_batch_size": 8, "steps": 9, "spike_window": 5}
    return TrainingSettings.model_validate(values | {"spike_threshold": 10.0} | changes)


def test_the_rule() -> None:
    spikes = Spikes(settings(spike_steps=2))
    usual = [3.0, 3.1, 2.9, 3.05, 2.95]
    assert [spikes.spiked(loss) for loss in [9.0, *usual]] == 6 * [False]  # too few before to compare with
    assert spikes.limit() == pytest.approx(3.0 + 10 * 1.4826 * 0.05)
    assert [spikes.spiked(loss) for loss in (9.0, 3.0, 9.0)] == 3 * [False]
    again = Spikes(settings(spike_steps=2))
    again.load_state(spikes.state())
    assert spikes.spiked(9.0)
    assert again.spiked(9.0)
    assert not Spikes(settings(spike_threshold=0.0)).spiked(1e9)
    flat = Spikes(settings())
    assert not any(flat.spiked(loss) for loss in [2.0] * 5)
    assert flat.limit() == pytest.approx(2.2)


def returned(folder: Path, run_dir: Path) -> tuple[int, int, list[str]]:
    """A run on two data ranks that spikes on one of them."""
    trainer = make_trainer(Case(data=2), folder, run_dir=run_dir)
    with pytest.MonkeyPatch.context() as patch:
        bad_samples(patch, range(4 * BATCH, 4 * BATCH + 1))
        changed = trainer.settings.training.model_copy(
            update={"spike_threshold": 10.0, "spike_window": 3, "spike_steps": 1}
        )
        checkpoint = trainer.settings.checkpoint.model_copy(update={"every": 2})
        trainer.settings = trainer.settings.model_copy(update={"training": changed, "checkpoint": checkpoint})
        trainer.spikes, trainer.objective.total_steps = Spikes(changed), 6
        with (
            StopRequest(None) as stop,
            Report(run_dir, trainer.settings.logging, active=False, start=0, steps=6) as report,
        ):
            trainer.run(stop, report)
    return trainer.step, trainer.skipped_samples, sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_all_ranks_return(data: Path, tmp_path: Path) -> None:
    said = run_world(2, returned, data, tmp_path)
    assert said[0] == said[1]
    assert said[0][:2] == (6, BATCH)
