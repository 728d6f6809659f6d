# SPDX-License-Identifier: Apache-2.0
"""Stopping from outside: real signals to real processes, and what ranks agree on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_bert.cli import main
from megatron_bert.training.metrics_file import METRICS_FILE, read_metrics
from megatron_bert.training.signals import STOPPED_CODE, STOPPED_FILE, StopRequest, exit_code
from megatron_bert.training.trainer import Trainer
from parallel.checkpoint import latest_checkpoint, read_state
from tests.megatron_bert.test_ending import members, wait_until
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import run_settings, write_config
from tests.pictures import WITHOUT_PICTURES
from tests.worlds import Together

ENDLESS = 10**6
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": WITHOUT_PICTURES}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of a run that only a signal ends."""
    make_data(tmp_path)
    settings = run_settings(tmp_path, tmp_path / "run", training__steps=ENDLESS, checkpoint__asynchronous=True)
    return write_config(settings, tmp_path / "settings.yaml")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_and_ends_a_process(config: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "megatron_bert", "pretrain", str(config)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"step 2/{ENDLESS}"):
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == STOPPED_CODE == 75, err
    newest = latest_checkpoint(config.parent / "run" / "checkpoints")
    assert newest is not None
    step = read_state(newest)["step"]
    assert f"stopped by {number.name} after step {step}: the same command goes on from there" in out
    assert "Traceback" not in err
    assert read_metrics(config.parent / "run" / METRICS_FILE)[-1]["step"] == step >= 2
    assert [path.name for path in newest.parent.iterdir()] == [newest.name]
    assert json.loads((config.parent / "run" / STOPPED_FILE).read_text()) == {"reason": number.name, "step": step}


def test_signals_to_every_process_of_the_run_until_it_has_ended(config: Path) -> None:
    # As a Slurm step gets them: loader processes and what they are forked from as well, again and again, and while the
    # interpreter shuts down.
    command = [sys.executable, "-m", "megatron_bert", "pretrain", str(config), "data.workers=1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"step 2/{ENDLESS}"):
                break
        moment = time.monotonic()
        while process.poll() is None:
            os.killpg(process.pid, signal.SIGUSR1)
            time.sleep(0.005)
            assert time.monotonic() - moment < 30
        out, err = process.communicate()
    assert process.returncode == STOPPED_CODE, err
    assert err == ""
    assert "stopped by SIGUSR1" in out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_loader_processes_do_not_outlive_their_trainer(config: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "megatron_bert", "pretrain", str(config), "data.workers=2"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"step 2/{ENDLESS}"):
                break
        assert len(members(process.pid)) >= 4
        process.send_signal(number)
        assert process.wait(30) == -number
        wait_until(lambda: not members(process.pid), 20)


def test_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exit_code(None) == 0
    assert exit_code("SIGTERM") == os.EX_TEMPFAIL
    monkeypatch.setenv("RANK", "0")
    assert exit_code("SIGTERM") == 0


def test_a_second_interrupt_ends_at_once(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Trainer.train_step

    def train_step(self: Trainer, *args: Any) -> Any:
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        assert main(["pretrain", str(config)]) == 130
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert latest_checkpoint(config.parent / "run" / "checkpoints") is None


def agree(signals: dict[int, list[signal.Signals]], limits: dict[int, float]) -> list[str | None]:
    """What this rank prints before and after it got its signals."""
    rank = dist.get_rank()
    with StopRequest(limits.get(rank)) as stop:
        before = stop.agreed() if not limits else None
        for number in signals.get(rank, []):
            signal.raise_signal(number)
        return [before, stop.agreed(), stop.agreed()]


#: Signals of ranks, limits of ranks, and what they agree on.
AGREEMENTS: list[tuple[dict[int, list[signal.Signals]], dict[int, float], str | None]] = [
    ({}, {}, None),
    ({1: [signal.SIGUSR1]}, {}, "SIGUSR1"),
    ({0: [signal.SIGTERM], 1: [signal.SIGTERM]}, {}, "SIGTERM"),
    ({0: [signal.SIGINT], 1: [signal.SIGTERM]}, {}, "SIGTERM"),
    ({}, {1: 0.0}, "training.max_minutes"),
    ({}, {0: 1000.0, 1: 1000.0}, None),
    ({0: [signal.SIGUSR1]}, {1: 0.0}, "SIGUSR1"),
    ({1: [signal.SIGTERM, signal.SIGINT]}, {}, "SIGINT"),
]


def _agree(number: int) -> list[str | None]:
    signals, limits, _ = AGREEMENTS[number]
    return agree(signals, limits)


@pytest.fixture(scope="module")
def together() -> Together:
    """One world for all agreements."""
    return Together(*((2, _agree, number) for number in range(len(AGREEMENTS))))


@pytest.mark.parametrize("number", range(len(AGREEMENTS)))
def test_ranks_agree(together: Together, number: int) -> None:
    expected = AGREEMENTS[number][2]
    assert together(2, _agree, number) == [[None, expected, expected]] * 2


def test_handlers_are_put_back() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest():
        assert all(signal.getsignal(number) not in before for number in numbers)
    assert [signal.getsignal(number) for number in numbers] == before
