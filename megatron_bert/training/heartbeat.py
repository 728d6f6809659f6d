# SPDX-License-Identifier: Apache-2.0
"""A small file that says what a run is doing, for monitors outside it."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from parallel.hosts import host_name
from parallel.whole_files import write_json

HEARTBEAT_FILE = "heartbeat.json"
#: Seconds between two writes while nothing but the step changes.
BEAT_SECONDS = 10.0


class Heartbeat:
    """``heartbeat.json`` of a run directory, written by the loop that trains: when that stands still, so does the file.

    It holds ``time`` (seconds since 1970), ``state``, ``step``, ``steps``, the last logged ``loss`` if there is one,
    ``host`` and ``pid``. States are ``training``, ``evaluating``, ``saving``, and at the end ``done``, ``stopped`` (it
    goes on when it is started again) or ``failed``.
    """

    def __init__(self, run_dir: Path, steps: int) -> None:
        self.path, self.steps = run_dir / HEARTBEAT_FILE, steps
        self.loss: float | None = None
        self._state, self._step, self._written = "", 0, 0.0

    def beat(self, state: str, step: int | None = None) -> None:
        """Write the state, unless it is the same as a moment ago; a file system that refuses is left alone."""
        self._step = self._step if step is None else step
        now = time.monotonic()
        if state == self._state and now - self._written < BEAT_SECONDS:
            return
        self._state, self._written = state, now
        known = {} if self.loss is None else {"loss": self.loss}
        values = {"time": time.time(), "state": state, "step": self._step, "steps": self.steps, **known}
        with suppress(OSError):
            write_json(self.path, values | {"host": host_name(), "pid": os.getpid()})
