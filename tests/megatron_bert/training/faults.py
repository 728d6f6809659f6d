# SPDX-License-Identifier: Apache-2.0
"""What breaks: checkpoints that are damaged, and disks while a run trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.training.metrics_file import METRICS_FILE
from megatron_bert.training.trainer import Trainer
from parallel.checkpoint import STATE_FILE
from parallel.manifest import MANIFEST_FILE

#: Changes a checkpoint's directory.
Damage = Callable[[Path], object]
#: Changes a run's directory while it trains.
Fault = Callable[[Path], None]


def flip(name: str, at: int) -> Damage:
    def damage(checkpoint: Path) -> None:
        path = next(checkpoint.glob(name))
        data = bytearray(path.read_bytes())
        data[at] ^= 4
        path.write_bytes(data)

    return damage


def cut(name: str) -> Damage:
    return lambda checkpoint: (path := next(checkpoint.glob(name))).write_bytes(path.read_bytes()[:-7])


def lose(name: str) -> Damage:
    return lambda checkpoint: next(checkpoint.glob(name)).unlink()


def without_checksums(damage: Damage) -> Damage:
    """As an older version wrote it."""

    def change(checkpoint: Path) -> None:
        (checkpoint / MANIFEST_FILE).unlink()
        state = json.loads((checkpoint / STATE_FILE).read_text())
        del state["manifest"]
        (checkpoint / STATE_FILE).write_text(json.dumps(state))
        damage(checkpoint)

    return change


def state(**changes: object) -> Damage:
    def change(checkpoint: Path) -> None:
        path = checkpoint / STATE_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def break_in_step(monkeypatch: pytest.MonkeyPatch, step: int, fault: Fault) -> None:
    original = Trainer.train_step

    def train_step(self: Trainer, *args: Any) -> Any:
        if self.step == step - 1:
            self.checkpoints.finish()  # so that it is known what is there
            fault(self.settings.training.run_dir)
        return original(self, *args)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def remove(name: str) -> Fault:
    def fault(run_dir: Path) -> None:
        target = run_dir / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()

    return fault


def block(name: str) -> Fault:
    """Something of another kind is where a directory, a file or a checkpoint is to be."""

    def fault(run_dir: Path) -> None:
        target = run_dir / name
        if target.is_dir():
            shutil.rmtree(target)
            target.touch()
        elif target.is_file():
            target.unlink()
            target.mkdir()
        else:
            target.touch()

    return fault


#: Faults by name, with what the run says of them.
FAULTS = {
    "run directory": (remove("."), f"{METRICS_FILE} was removed or replaced"),
    "checkpoints": (remove("checkpoints"), ""),
    "metrics": (remove(METRICS_FILE), f"{METRICS_FILE} was removed or replaced"),
    "a directory for metrics": (block(METRICS_FILE), f"warning: {METRICS_FILE} cannot be written (Is a directory)"),
    "a file for TensorBoard": (block("tensorboard"), "warning: TensorBoard's events cannot be written (File exists)"),
    "a file for traces": (block("traces"), "warning: the trace of a step cannot be written (File exists)"),
    "a file for curves": (block("curves.png"), ""),
    "a file for a checkpoint": (block("checkpoints/step_00000004"), ""),
    "a file for a partial one": (block("checkpoints/step_00000004.partial"), ""),
}
