# SPDX-License-Identifier: Apache-2.0
"""How a command starts with little work, and how it ends meanwhile: at once, for there is nothing yet to be undone.

It imports almost nothing, so that signals find it from the first moment. :class:`~megatron_bert.ending.Ending` takes
over when the command begins.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
from types import FrameType

#: What ends a command, or asks training to save and stop.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_STDERR = 2
_USUAL = gc.get_threshold()


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


def collect_rarely() -> None:
    """Look for garbage less often than Python does, and not at the end: for a process that runs one command.

    Imports make objects that all stay, half a million with torch. To look through them over and over, and once more at
    the end, takes a fifth of the time of a short command.
    """
    gc.set_threshold(100_000, 50, 1000)
    atexit.register(gc.freeze)


def collect_as_usual() -> None:
    """Undo :func:`collect_rarely` for what comes, and never look at what there is by now.

    For runs, once their modules are imported: steps wait for the garbage collector, and loader processes copy the
    memory that it touches.
    """
    gc.freeze()
    gc.set_threshold(*_USUAL)
