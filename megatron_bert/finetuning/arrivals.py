# SPDX-License-Identifier: Apache-2.0
"""Rows of a stream as they arrive: those of a pipe are handed on when there are no more, so nobody waits for others."""

from __future__ import annotations

import os
import select
import stat
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import IO, Protocol

#: Most bytes that one read of a pipe takes.
_READ_BYTES = 1 << 16


class Rows(Protocol):
    """Lines of text, in blocks."""

    def take(self, most: int, wait: float = 0.0) -> list[str]:
        """The next lines, at least one; none at the end.

        Args:
            most: how many at most.
            wait: seconds for which to wait for others to come, once there is one.
        """


@contextmanager
def arriving(file: IO[str]) -> Iterator[Rows]:
    """The lines of a file, pipe, socket or terminal.

    Args:
        file: of UTF-8 text that nothing was read from. Bytes that are not UTF-8 come as lone surrogates.
    """
    try:
        descriptor = file.fileno()
        open_ended = not stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:  # of text in memory
        open_ended = False
    if not open_ended:
        yield _AtHand(file)
        return
    pipe = _Pipe(descriptor)
    try:
        yield pipe
    finally:
        pipe.close()


class _AtHand:
    """Lines that can be read at any time."""

    def __init__(self, file: IO[str]) -> None:
        self._lines = iter(file)

    def take(self, most: int, wait: float = 0.0) -> list[str]:  # noqa: ARG002
        return list(islice(self._lines, most))


class _Pipe:
    """Lines that a thread reads ahead, while the model computes; no more of them than were last asked for.

    Args:
        descriptor: to read; left open.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: deque[str] = deque()
        self._changed = threading.Condition()
        self._room, self._ended, self._closed = 1, False, False
        self._failure: OSError | None = None
        self._woken, self._wake = os.pipe()
        self._poll = select.poll()
        for readable in (descriptor, self._woken):
            self._poll.register(readable, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="rows", daemon=True)
        self._thread.start()

    def take(self, most: int, wait: float = 0.0) -> list[str]:
        with self._changed:
            self._room = most
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._lines or self._ended)
            until = time.monotonic() + wait
            while len(self._lines) < most and not self._ended and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            if not self._lines and self._failure is not None:
                raise self._failure
            taken = [self._lines.popleft() for _ in range(min(most, len(self._lines)))]
            self._changed.notify_all()
            return taken

    def close(self) -> None:
        """End the thread, whether or not there is more to read."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        os.close(self._wake)  # which wakes the thread
        self._thread.join()
        os.close(self._woken)

    def _run(self) -> None:
        try:
            for line in self._read_lines():
                with self._changed:
                    self._changed.wait_for(lambda: len(self._lines) < self._room or self._closed)
                    if self._closed:
                        return
                    self._lines.append(line.decode("utf-8", errors="surrogateescape"))
                    self._changed.notify_all()
        except OSError as error:
            self._failure = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _read_lines(self) -> Iterator[bytes]:
        parts: list[bytes] = []
        while chunk := self._read():
            first, *others = chunk.split(b"\n")
            parts.append(first)
            for part in others:
                yield b"".join(parts)
                parts = [part]
        if any(parts):
            yield b"".join(parts)

    def _read(self) -> bytes:
        """Some bytes; none at the end, or when no more rows are wanted."""
        ready = dict(self._poll.poll())
        return b"" if self._woken in ready else os.read(self._descriptor, _READ_BYTES)
