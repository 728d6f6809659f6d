# SPDX-License-Identifier: Apache-2.0
"""Stopping a run from outside: signals and the time limit, agreed on by all ranks, and what the run says of it."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist

from megatron_bert.ending import SIGNALS, leave_terminal
from megatron_bert.training.run_lock import RunLock
from parallel.errors import UserError

_TIME_LIMIT = -1
#: Exit code of a process alone whose run saved and stopped before its last step: the same command goes on from there.
#: The number is EX_TEMPFAIL of sysexits.h, "try again later".
STOPPED_CODE = 75
#: In a run directory while the run has stopped before its last step: why, and after which step.
STOPPED_FILE = "stopped.json"


class StopRequest:
    """Remembers that the run was asked to stop, while the block lasts.

    SIGTERM, SIGINT, SIGUSR1 and, without ``nohup``, SIGHUP ask for a checkpoint and a clean end after the current step;
    a second SIGINT interrupts at once. So does the time limit.

    Args:
        max_minutes: time limit from now, or None.
        ends_process: whether the process ends soon after the block. Then all but SIGINT are ignored from there on:
            the interpreter puts back the default handlers while it shuts down, and a signal that comes late, or a
            second time, would make a failure of a run that has ended well.
        lock: of the run directory; None where there is none.

    Attributes:
        save_failed: a rank that knows that a checkpoint was not written says so here; after :meth:`agreed` all know.
    """

    def __init__(
        self, max_minutes: float | None = None, *, ends_process: bool = False, lock: RunLock | None = None
    ) -> None:
        self.lock = lock
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.ends_process = ends_process
        self.save_failed = False
        self._received = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, UserError):
            # This rank failed. A launcher that stops the ranks because another one failed too must not cut off its
            # report; it ends as soon as that is out.
            return
        for number, handler in self._previous.items():
            if self.ends_process and number != signal.SIGINT:
                handler = signal.SIG_IGN
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._received == signal.SIGINT == number:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            leave_terminal()
        self._received = number

    def agreed(self) -> str | None:
        """Why to stop, the same answer on every rank; None to go on. Every rank must call at the same step.

        Raises:
            UserError: another process has taken the run directory over: nothing more may be written.
        """
        mine = self._received
        if mine == 0 and self.deadline is not None and time.monotonic() >= self.deadline:
            mine = _TIME_LIMIT
        # Signals reach ranks at different moments; the minimum and maximum together say whether any rank has one.
        taken = self.lock is not None and self.lock.taken_by is not None
        asked = torch.tensor([mine, -mine, int(taken), int(self.save_failed)])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if asked[2] > 0:
            if self.lock is not None:
                self.lock.refuse_if_taken()
            raise UserError("another process has taken the run directory over: stopped; rank 0 says which")
        self.save_failed = bool(asked[3])
        if asked[0] > 0:
            return signal.Signals(int(asked[0])).name
        return "training.max_minutes" if asked[1] > 0 else None


def exit_code(reason: str | None) -> int:
    """What a process ends with whose run ended for a reason, or reached its last step (None).

    Launchers take any code but 0 for a failure, and start the ranks again or end the others before they are done. So a
    rank of several always ends with 0, and :data:`STOPPED_FILE` says the rest.
    """
    return 0 if reason is None or "RANK" in os.environ else STOPPED_CODE
