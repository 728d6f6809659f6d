# SPDX-License-Identifier: Apache-2.0
"""How every command ends: by itself, by a signal, by an error of the file system, or because nobody reads its output.

A command runs inside :class:`Ending`. SIGTERM, SIGHUP and SIGUSR1 raise :class:`Terminated` in the main thread, as
SIGINT raises KeyboardInterrupt, so that every ``finally`` and context manager removes what it began; the exit code is
128 plus the number of the signal. Signals that are ignored from the start (``nohup``) stay ignored. Training replaces
the handlers while it runs (:class:`~megatron_bert.training.signals.StopRequest`). Before the block, while modules are
imported, :mod:`megatron_bert.starting` ends the process.
"""

from __future__ import annotations

import errno
import functools
import os
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, parent_process, resource_tracker
from types import FrameType, TracebackType
from typing import Any, Self

from megatron_bert.starting import SIGNALS, end_at_once, sentence_on
from parallel.errors import UserError
from parallel.whole_files import reason_of

#: Exit code of a command whose output nobody reads, as of a program that SIGPIPE ends.
_BROKEN_PIPE_CODE = 128 + signal.SIGPIPE
#: Seconds that native code may hold up the end of a command; it can only be left with the whole process.
_PATIENCE = 5.0
#: Seconds after which a worker that was asked to end does so by itself.
_GRACE = 1.0
#: Seconds in which a signal that is sent again does not disturb the cleaning up.
_REPEATED = 5.0
#: Where the interpreter imports modules.
_IMPORTING = "<frozen importlib._bootstrap>"
#: Seconds that ranks above 0 hold back an error: rank 0 reports what all of them found, once, and the launcher then
#: stops the others. An error of one rank alone comes through.
_HOLD_BACK = 3.0
#: What may be over at the next try: the exit code is not that of a mistake, so that a launcher does try again.
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EINTR, errno.EAGAIN}
_REMEDIES = {
    errno.ENOSPC: "free some space, or give a place that has more",
    errno.EDQUOT: "free some space, or give a place that has more",
    errno.EACCES: "give a place that you have access to",
    errno.EPERM: "give a place that you have access to",
    errno.EROFS: "give a place that can be written to",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "give a path whose parents are directories",
    errno.ELOOP: "give a path without a circle of links",
    errno.EIO: "look at the disk, which has failed to read or write, or give a place on another",
    errno.ESTALE: "mount the network file system again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


class Terminated(SystemExit):
    """A signal, whose number it has, asks the process to end."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(128 + number)

    def __str__(self) -> str:
        return sentence_on(self.number)


class Ending:
    """The block in which a command works; afterwards :attr:`code` says how it ended, and a line on stderr why.

    Handled are: mistakes of the user (exit code 2), what the file system refuses (2; 1 where the next try may succeed),
    signals (128 plus their number), and output that nobody reads (141). Other errors come through. A block inside
    another leaves signals to that one.

    Args:
        name: of the command, as it stands before its errors.

    Attributes:
        code: the exit code; the block may set it.
        deferred: a signal that came during an import and waits for its end; None without.
    """

    _outermost: Ending | None = None

    def __init__(self, name: str) -> None:
        self.name, self.code = name, 0
        self.deferred: int | None = None
        self._asked: int | None = None
        self._asked_at = 0.0
        self._frame: FrameType | None = None
        self._previous: dict[int, Any] = {}
        self._watch: _Watch | None = None

    def __enter__(self) -> Self:
        if Ending._outermost is None and threading.current_thread() is threading.main_thread():
            Ending._outermost = self
            self._frame = sys._getframe(1)
            self._watch = _Watch(self)
            for number in SIGNALS:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, end_at_once):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if Ending._outermost is self:
            Ending._outermost = self._frame = None
            for number, handler in self._previous.items():
                if self.owns(number):  # training may have left others for the rest of the process
                    signal.signal(number, handler)
            assert self._watch is not None
            self._watch.close()
        elif isinstance(error, (Terminated, KeyboardInterrupt)):
            return False
        if self._asked is not None and isinstance(error, Exception | None):
            error = Terminated(self._asked)  # which was lost on the way, in a destructor say, or met another error
        if isinstance(error, SystemExit) and not isinstance(error, Terminated):
            if (code := _flush(self.name)) != 0:
                raise SystemExit(code) from None
            return False
        if error is None:
            self.code = self.code or _flush(self.name)
            return True
        reported = self._reported(error)
        if reported is not None:
            self.code = reported
        return reported is not None

    def owns(self, number: int) -> bool:
        """Whether a signal would come here."""
        return signal.getsignal(number) == self._handle

    def handled(self, number: int) -> bool:
        """Whether a signal has come here."""
        return self._asked == number

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._importing(frame):
            self.deferred = number  # the watch sends it again
            return
        repeated = self._asked == number and time.monotonic() - self._asked_at < _REPEATED
        self._asked, self._asked_at = number, time.monotonic()
        if number == signal.SIGHUP:
            leave_terminal()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if not repeated:
            raise Terminated(number)

    def _importing(self, frame: FrameType | None) -> bool:
        """Whether the block is importing a module, where an exception may get lost, or become another."""
        while frame is not None and frame is not self._frame:
            if frame.f_code.co_filename == _IMPORTING:
                return True
            frame = frame.f_back
        return False

    def _reported(self, error: BaseException) -> int | None:
        """Say what ended the command; its exit code, or None for what is not to be handled here."""
        if isinstance(error, Terminated):
            _say(str(error))
            return 128 + error.number
        if isinstance(error, KeyboardInterrupt):
            return self._reported(Terminated(signal.SIGINT))
        if not isinstance(error, UserError | OSError):
            return None
        if isinstance(error, BrokenPipeError) and _unread(_standard_output()):
            _to_null(_standard_output())  # the interpreter will try to write the rest
            return _BROKEN_PIPE_CODE
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_HOLD_BACK)
        _say(f"{self.name}: {_sentence(error)}")
        return 1 if isinstance(error, OSError) and error.errno in _PASSING else 2


def command(name: str) -> Callable[[Callable[..., int | None]], Callable[..., int]]:
    """Make a function that returns an exit code, or None for 0, the work of a command, as in :class:`Ending`."""

    def decorate(work: Callable[..., int | None]) -> Callable[..., int]:
        @functools.wraps(work)
        def run(*args: Any, **kwargs: Any) -> int:
            with Ending(name) as ending:
                ending.code = work(*args, **kwargs) or 0
            return ending.code

        return run

    return decorate


def _forget() -> None:
    """In a process that is forked: its signals are not those of the command."""
    if Ending._outermost is not None:
        Ending._outermost = None
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)


class _Watch:
    """A thread that sends signals again that came during an import, and that sees to it that they do end the process.

    Native code may keep the main thread from hearing of them.
    """

    def __init__(self, ending: Ending) -> None:
        self.ending = ending
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.previous = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.main = threading.get_ident()
        self.thread = threading.Thread(target=self._run, name="ending", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while numbers := os.read(self.reader, 64):
            mine = [number for number in numbers if number in SIGNALS and self.ending.owns(number)]
            if not mine:
                continue
            deadline = time.monotonic() + _PATIENCE
            while not any(map(self.ending.handled, mine)) and time.monotonic() < deadline:
                time.sleep(0.05)
                if (number := self.ending.deferred) is not None and self.ending.owns(number):
                    self.ending.deferred = None
                    signal.pthread_kill(self.main, number)
            if not any(map(self.ending.handled, mine)) and self.ending.owns(mine[0]):
                _say(str(Terminated(mine[0])))
                os._exit(128 + mine[0])

    def close(self) -> None:
        signal.set_wakeup_fd(self.previous)
        os.close(self.writer)
        self.thread.join()
        os.close(self.reader)


def _sentence(error: UserError | OSError) -> str:
    if isinstance(error, UserError):
        return str(error)
    place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "the output or a file"
    remedy = _REMEDIES.get(error.errno or 0, "give another place, or make this one usable")
    return f"cannot use {place} ({reason_of(error)}): {remedy}"


def _say(text: str) -> None:
    """A line on stderr, if there is one still."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _flush(name: str) -> int:
    """Write out what was printed; the exit code if that is not possible, else 0."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        _to_null(_standard_output())  # the interpreter will try once more
        if isinstance(error, BrokenPipeError):
            return _BROKEN_PIPE_CODE
        _say(f"{name}: cannot write to the standard output ({reason_of(error)}): {_REMEDIES[errno.ENOSPC]}")
        return 2
    except ValueError:  # closed
        pass
    return 0


def _standard_output() -> int:
    try:
        return sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # none, not a file, or closed
        return 1


def _unread(descriptor: int) -> bool:
    """Whether a descriptor is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def leave_terminal() -> None:
    """Write nowhere from here on where there was a terminal: after SIGHUP it is gone, and would be an error."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                _to_null(descriptor)


def _to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


@contextmanager
def shielded_start() -> Iterator[None]:
    """Start processes that do not hear :data:`SIGNALS` until they unblock them.

    They reach a whole process group, or every process of a Slurm step, and are for the one that starts the others. None
    is lost: those that come during the block are handled after it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # which unblocks some
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_of_a_command() -> None:
    """Leave signals to the parent, which ends the work; but end if it is this process alone that is asked to."""
    end_with_parent()

    def leave(number: int, _frame: FrameType | None) -> None:
        time.sleep(_GRACE)  # a parent that got the signal too is gone, or has closed the pool, by then
        os._exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, leave if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def end_with_parent() -> None:
    """Let this process, which multiprocessing started, end at once when the one that started it is gone.

    Whatever ended that one, SIGKILL included: the system closes its end of a pipe that this process holds the other of.
    """
    parent = parent_process()
    assert parent is not None, "called in a process that multiprocessing started"

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
