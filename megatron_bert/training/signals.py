"""Stopping a run from outside: signals and the time limit, agreed on by all ranks."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist

from parallel.errors import UserError

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_TIME_LIMIT = -1


class StopRequest:
    """Remembers that the run was asked to stop, while the block lasts.

    SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint and a clean end after the current step; a second SIGINT interrupts
    at once. So does the time limit.

    Args:
        max_minutes: time limit from now, or None.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._received = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
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
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._received = number

    def agreed(self) -> str | None:
        """Why to stop, the same answer on every rank; None to go on. Every rank must call at the same step."""
        mine = self._received
        if mine == 0 and self.deadline is not None and time.monotonic() >= self.deadline:
            mine = _TIME_LIMIT
        # Signals reach ranks at different moments; the minimum and maximum together say whether any rank has one.
        asked = torch.tensor([mine, -mine])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if asked[0] > 0:
            return signal.Signals(int(asked[0])).name
        return "training.max_minutes" if asked[1] > 0 else None
