# SPDX-License-Identifier: Apache-2.0
"""A process of its own that writes files from memory it shares with this one, so that neither waits for the other.

It loads no torch, starts in a fraction of a second and takes a few megabytes. Files are opened by the process that
asks, and handed over open: what is still being written when that one is gone can reach no file of its successor.
Signals are for the process that asks, too; the writing one ends with it, however it ends.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from parallel.manifest import FileSums, SummingFile

#: What reaches all processes of a terminal, a container or a Slurm step.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
#: Seconds in which it ends when it is not wanted any more.
_PATIENCE = 2.0
_START = "import sys; sys.path.append({root!r}); from parallel.file_process import serve; serve({descriptor})"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a file: values, and the bytes around them, which hold the values' checksum.

    Attributes:
        start: offset of the values in the shared memory.
        nbytes: size of the values.
        head: bytes before them.
        tail: bytes after them.
        head_crc: offset in ``head`` of their CRC-32, four bytes, least significant first.
        tail_crc: the same in ``tail``.
    """

    start: int
    nbytes: int
    head: bytes
    tail: bytes
    head_crc: int
    tail_crc: int

    @property
    def length(self) -> int:
        """Size in the file."""
        return len(self.head) + self.nbytes + len(self.tail)


def write_pieces(descriptor: int, pieces: Iterable[tuple[Piece, memoryview]]) -> FileSums:
    """Write a file to the disk; what it holds.

    Args:
        descriptor: of the file, which is empty; it is closed.
        pieces: of the file in their order, and their values.

    Raises:
        OSError: the file system refuses.
    """
    with SummingFile(open(descriptor, "wb")) as file:
        for piece, values in pieces:
            crc = zlib.crc32(values).to_bytes(4, "little")
            for content, at in ((piece.head, piece.head_crc), (None, 0), (piece.tail, piece.tail_crc)):
                file.write(values if content is None else content[:at] + crc + content[at + 4 :])
        os.fsync(file.fileno())
        return file.sums()


class FileProcess:
    """The process as the one that asks sees it.

    Args:
        memory: descriptor of the memory that it writes from.
        pieces: of every file.
    """

    def __init__(self, memory: int, pieces: Sequence[Piece]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            code = _START.format(root=str(Path(__file__).resolve().parents[1]), descriptor=theirs.fileno())
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            try:
                # Isolated from the environment and from what is installed: the standard library is all that it needs.
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", code], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._connection = Connection(ours.detach())
        # Also when this is forgotten, and when the interpreter ends.
        self._end = weakref.finalize(self, _end, self._connection, self._process)
        self._prepared: Callable[[], None] | None = lambda: self._prepare(memory, pieces)

    def _prepare(self, memory: int, pieces: Sequence[Piece]) -> None:
        reduction.send_handle(self._connection, memory, self._process.pid)
        self._connection.send(tuple(pieces))

    def write(self, path: Path) -> FileSums:
        """Write what the memory holds to a new file; returns when it is on the disk, and what it holds.

        Raises:
            OSError: the file system refuses, or the process has been killed.
        """
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if self._prepared is not None:
                self._prepared()
                self._prepared = None
            reduction.send_handle(self._connection, descriptor, self._process.pid)
            answer = self._connection.recv()
        except (EOFError, ConnectionError, BrokenPipeError):
            code = self._process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise OSError(f"the process that writes it {how}") from None
        finally:
            os.close(descriptor)
        if isinstance(answer, OSError):
            raise answer
        assert isinstance(answer, FileSums)
        return answer

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can write."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process while it writes; who waits for it learns of that."""
        self._process.kill()

    def close(self) -> None:
        """End the process, which is not writing."""
        self._end()


def _end(asking: Connection, process: subprocess.Popen[bytes]) -> None:
    asking.close()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:  # it waits for a disk
        process.kill()


def serve(descriptor: int) -> None:
    """What the process does, until the one that asks is gone.

    Args:
        descriptor: of the socket by which it is asked.
    """
    threading.Thread(target=_end_with, args=(descriptor,), daemon=True).start()
    with suppress(EOFError, ConnectionError):
        _serve(Connection(descriptor))


def _serve(connection: Connection) -> None:
    memory: Any = mmap.mmap(reduction.recv_handle(connection), 0, access=mmap.ACCESS_READ)
    view = memoryview(memory)
    pieces: tuple[Piece, ...] = connection.recv()
    while True:
        file = reduction.recv_handle(connection)
        try:
            answer: FileSums | OSError = write_pieces(
                file, ((piece, view[piece.start : piece.start + piece.nbytes]) for piece in pieces)
            )
        except OSError as error:
            answer = OSError(error.errno, error.strerror)
        connection.send(answer)


def _end_with(descriptor: int) -> None:
    """End the process as soon as nobody holds the other end of its socket."""
    poll = select.poll()
    poll.register(descriptor, select.POLLRDHUP)
    poll.poll()
    os._exit(0)
