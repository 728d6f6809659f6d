# SPDX-License-Identifier: Apache-2.0
"""What breaks on the disk while a run trains: it goes on, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bert.training.metrics_file import METRICS_FILE, read_metrics
from megatron_bert.training.pretrain import pretrain
from parallel.checkpoint import whole_checkpoints
from tests.megatron_bert.training.faults import FAULTS, break_in_step
from tests.megatron_bert.training.runs import STEPS, run_settings


@pytest.mark.parametrize("name", FAULTS)
def test_pretraining(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    name: str,
) -> None:
    if "curves" in name:
        request.getfixturevalue("pictures")
    fault, says = FAULTS[name]
    break_in_step(monkeypatch, 3, fault)
    monkeypatch.setattr("megatron_bert.training.timeline.gantt_png", lambda *_: None)  # drawing takes long
    more = {"logging__tensorboard": "Tensor" in name, "logging__trace": "traces" in name}
    run_dir = tmp_path / "run"
    pretrain(run_settings(data, run_dir, checkpoint__every=2, **more))
    output = capsys.readouterr().out
    assert says in output
    assert not says or output.count(says) == 1
    assert list(whole_checkpoints(run_dir / "checkpoints"))[-2:] == [4, 6]
    if name != "a directory for metrics":
        assert read_metrics(run_dir / METRICS_FILE)[-1]["step"] == STEPS
