# SPDX-License-Identifier: Apache-2.0
"""Two ranks, sharing every matrix, train as one process does; a launch that is stopped at once saves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_bert.training.pretrain import pretrain
from parallel.checkpoint import latest_checkpoint
from tests.commands import run_ranks
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import STEPS, rows, run_settings, write_config
from tests.pictures import WITHOUT_PICTURES


@pytest.mark.slow
def test_tensor_parallel_run(tmp_path: Path) -> None:
    make_data(tmp_path)
    pretrain(run_settings(tmp_path, tmp_path / "one"))
    config = write_config(run_settings(tmp_path, tmp_path / "one"), tmp_path / "settings.yaml")
    overrides = [f"training.run_dir={tmp_path / 'two'}", "parallel.data=1", "parallel.tensor=2"]
    ended = run_ranks(2, "pretrain", str(config), *overrides, "parallel.sequence=true", folder=tmp_path)
    text = "".join(rank.text for rank in ended)
    assert [rank.code for rank in ended] == [0, 0], text
    assert text.count(f"step {STEPS}/{STEPS} | loss") == 1  # rank 0 alone reports
    assert "tensor 2 (sequence parallel)" in ended[0].text
    found, expected = rows(tmp_path / "two"), rows(tmp_path / "one")
    assert len(found) == len(expected) == STEPS + 1
    for mine, theirs in zip(found, expected, strict=True):
        # float32 sums in another order; a smooth update (large eps) does not amplify them.
        assert mine == pytest.approx(theirs, rel=1e-5)
    newest = latest_checkpoint(tmp_path / "two" / "checkpoints")
    assert newest is not None
    assert len(list(newest.glob("*.distcp"))) == 2


@pytest.mark.slow
def test_stop_in_the_first_second(tmp_path: Path) -> None:
    """Before the ranks are there to hear it."""
    make_data(tmp_path)
    config = write_config(run_settings(tmp_path, tmp_path / "run", parallel__data=None), tmp_path / "settings.yaml")
    script = Path(__file__).resolve().parents[2] / "launch" / "torchrun.sh"
    started = subprocess.Popen(
        ["bash", str(script), "--processes", "2", "--logs", "logs", "pretrain", str(config), "training.steps=100000"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": WITHOUT_PICTURES},
    )
    time.sleep(0.3)  # the script has come to its traps
    started.terminate()
    output, _ = started.communicate(timeout=200)
    assert started.returncode == 0, output
    assert json.loads((tmp_path / "run" / "stopped.json").read_text())["reason"] == "SIGUSR1"
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") is not None
