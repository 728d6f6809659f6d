# SPDX-License-Identifier: Apache-2.0
"""How long a rank works for itself in a step, without the time in which it waits for others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from parallel.presence import waits_for_others

_waited = 0.0


@contextmanager
def waiting() -> Iterator[None]:
    """The block waits for other ranks, on the host."""
    global _waited
    began = perf_counter()
    try:
        yield
    finally:
        _waited += perf_counter() - began


@contextmanager
def counting_waits() -> Iterator[None]:
    """Count what torch's own collectives wait on the host, FSDP's too; those of a GPU wait in its stream instead."""
    original: Callable[..., Any] = dist.Work.wait

    @waits_for_others
    def wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
        with waiting():
            return original(work, *args, **kwargs)

    dist.Work.wait = wait  # type: ignore[method-assign]
    try:
        yield
    finally:
        dist.Work.wait = original  # type: ignore[method-assign]


class StepClock:
    """Adds up the parts of steps in which this rank works for itself.

    Work on the CPU counts without what :func:`counting_waits` sees of waiting. On a GPU the work of the last step is
    timed in its stream, collectives of tensor parallelism included, which the ranks of a group share.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._seconds, self._steps = 0.0, 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin_step(self) -> None:
        """Another step begins."""
        self._steps += 1
        self._events.clear()

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """The block works on the host."""
        began, waited = perf_counter(), _waited
        yield
        self._seconds += perf_counter() - began - (_waited - waited)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The block computes."""
        if not self.on_gpu:
            with self.on_host():
                yield
            return
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        yield
        ended.record()
        self._events.append((began, ended))

    def read(self) -> float:
        """Seconds of work in a step, on average since the last reading; on a GPU the device has to be done with it."""
        seconds = self._seconds / max(1, self._steps)
        seconds += sum(began.elapsed_time(ended) for began, ended in self._events) / 1000
        self._seconds, self._steps = 0.0, 0
        return seconds
