# SPDX-License-Identifier: Apache-2.0
"""A process of a launched run: which rank it is, a log file of its own, and a record of how it ended."""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_bert.ending import SIGNALS
from megatron_bert.launching.records import Record, rank_file
from megatron_bert.launching.slurm_environment import adopt_slurm
from parallel.errors import UserError

#: Names the directory for the log files and records of a start; launchers set it.
LOG_VARIABLE = "MEGATRON_BERT_LOG_DIR"
#: Seconds that leftover loader processes, and the last lines of rank 0, may take at the end.
_PATIENCE = 5.0
#: The same where the run has failed.
_AFTER_A_FAILURE = 0.5


@contextmanager
def launched_process() -> Iterator[None]:
    """What a rank of a run does around its work, under torchrun, under srun and alone.

    Tasks that srun started learn their rank. Where :data:`LOG_VARIABLE` names a directory, everything the process
    writes goes to a log file of the rank, for rank 0 also to where it went before, and a record says when the rank
    started and how it ended. Loader processes that are still there at the end are removed.

    Raises:
        UserError: the directory cannot be written.
    """
    adopt_slurm()
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    named = os.environ.get(LOG_VARIABLE)
    record, echo, patience = None, None, _PATIENCE
    if named is not None:
        folder = Path(named)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            log = rank_file(folder, rank, "log")
            echo = _log_to(log, echo=rank == 0)
            record = Record(folder, rank)
            record.write("started", size=size, log_bytes=log.stat().st_size)
        except OSError as error:
            raise UserError(f"{LOG_VARIABLE} is {named}, which cannot be written ({error.strerror})") from None
    before = multiprocessing.active_children()
    try:
        yield
    except BaseException as error:
        # Who starts the ranks again waits for this one to end.
        patience = _AFTER_A_FAILURE
        if echo is not None:
            echo.patience = patience
        if record is not None:
            record.failed(error)
        raise
    else:
        if record is not None:
            record.write("ended")
    finally:
        _end_children([child for child in multiprocessing.active_children() if child not in before], patience)


def _log_to(path: Path, *, echo: bool) -> _Echo | None:
    """Send this process's standard output and error, of native code too, to a file, and back to where it went.

    Returns:
        What brings it back; None where it is not to be.
    """
    back = None
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    if echo:
        originals = os.dup(1), os.dup(2)
        tee = subprocess.Popen(["tee", "-a", str(path)], stdin=subprocess.PIPE, preexec_fn=_ignore_signals)
        assert tee.stdin is not None
        os.dup2(tee.stdin.fileno(), 1)
        os.dup2(tee.stdin.fileno(), 2)
        tee.stdin.close()
        back = _Echo(tee, originals)
        atexit.register(back.finish)
    else:
        os.dup2(file, 1)
        os.dup2(file, 2)
    os.close(file)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    faulthandler.enable()  # a crash of native code shows where Python was
    return back


def _ignore_signals() -> None:
    """What ends the run must not end its last words."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _Echo:
    """What brings the output of this process back to where it went before.

    Args:
        originals: descriptors of the standard output and error as they were.
    """

    def __init__(self, tee: subprocess.Popen[bytes], originals: tuple[int, int]) -> None:
        self.tee, self.originals, self.patience = tee, originals, _PATIENCE

    def finish(self) -> None:
        """Close the pipe, and let the last lines through before a launcher takes the process for gone."""
        sys.stdout.flush()
        sys.stderr.flush()
        for target, original in zip((1, 2), self.originals, strict=True):
            os.dup2(original, target)
        with suppress(subprocess.TimeoutExpired):  # a process that inherited the pipe lives on; tee ends with it
            self.tee.wait(self.patience)


def _end_children(children: list[BaseProcess], patience: float) -> None:
    """Loader processes end by themselves; one that hangs, on a file system say, must not keep the run."""
    until = time.monotonic() + patience
    for child in children:
        child.join(max(0.0, until - time.monotonic()))
        if child.is_alive():
            child.kill()
