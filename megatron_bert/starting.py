# SPDX-License-Identifier: Apache-2.0
"""How a command ends while it is only starting: at once, because nothing has begun that would have to be undone.

It imports almost nothing, so that signals find it from the first moment. :class:`~megatron_bert.ending.Ending` takes
over when the command begins.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: What ends a command, or asks training to save and stop.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_STDERR = 2


def sentence_on(number: int) -> str:
    """What a command says that a signal has ended."""
    return "interrupted" if number == signal.SIGINT else f"terminated by {signal.Signals(number).name}"


def end_at_once(number: int, _frame: FrameType | None) -> None:
    """Say so and leave, without an exception that whatever is being imported could take for something else."""
    try:
        os.write(_STDERR, f"{sentence_on(number)}\n".encode())
    finally:
        os._exit(128 + number)


def catch_signals() -> None:
    """End by :func:`end_at_once` from here on; signals that are ignored (``nohup``) stay so."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end_at_once)


@contextmanager
def uncollected_imports(freeze: bool) -> Iterator[None]:
    """No garbage collection while the block imports modules: their objects, half a million with torch, all stay.

    Args:
        freeze: whether no later collection looks at what there is by then, either: for a process that runs one command,
            whose steps would wait for it, and whose loader processes would copy the memory that it touches.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.freeze()
        if collecting:
            gc.enable()
