# SPDX-License-Identifier: Apache-2.0
"""Makes a training process wait, or fail, after one of its steps. Python imports this by itself from PYTHONPATH.

HOLD_STEP names the step, and HOLD_FOLDER takes a file for each rank that waits. A rank waits for a signal or the run's
time limit; when it has come to one rank, no other waits any longer. Only the first start of a job, and the first task
of an array, waits. With FAIL_RANK no rank waits, and that one raises an error, once. With PACE every step of every
start takes that many seconds longer. In all of them the garbage collector is off: half of what they do is to import.
"""

from __future__ import annotations

import atexit
import gc
import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path

gc.disable()
atexit.register(gc.freeze)


def _hold(module):
    original = module.StopRequest.agreed
    folder = Path(os.environ["HOLD_FOLDER"])
    calls = 0

    def agreed(self):
        nonlocal calls
        calls += 1
        if calls == int(os.environ["HOLD_STEP"]):
            rank = os.environ.get("RANK", "0")
            if os.environ.get("FAIL_RANK") == rank and not (folder / "failed").exists():
                (folder / "failed").touch()
                raise ArithmeticError("this rank fails here")
            (folder / f"rank_{rank}").touch()
            while "FAIL_RANK" not in os.environ and not (self._received or (folder / "over").exists()):
                if self.deadline is not None and time.monotonic() > self.deadline:
                    break
                time.sleep(0.05)
            (folder / "over").touch()
        return original(self)

    module.StopRequest.agreed = agreed


def _slow_down(module):
    original = module.StopRequest.agreed

    def agreed(self):
        time.sleep(float(os.environ["PACE"]))
        return original(self)

    module.StopRequest.agreed = agreed


def _draw_nothing(module):
    module.draw_curves = lambda run_dir: None


_CHANGES = {"megatron_bert.training.curves": _draw_nothing}
if "HOLD_STEP" in os.environ and not any(
    os.environ.get(name, "0") != "0" for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID")
):
    _CHANGES["megatron_bert.training.signals"] = _hold
if "PACE" in os.environ:
    _CHANGES["megatron_bert.training.signals"] = _slow_down


class _Finder(importlib.abc.MetaPathFinder):
    """Changes modules once they are loaded."""

    def find_spec(self, name, path, target=None):
        change = _CHANGES.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder())
