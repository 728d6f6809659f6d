# SPDX-License-Identifier: Apache-2.0
"""Consecutive bytes of a file, read when they are asked for."""

from __future__ import annotations

import io
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parallel.errors import DamagedFileError
from parallel.whole_files import reporting

_REMEDY = "check the disk, or use a copy of the file"


@dataclass(frozen=True)
class FileRange:
    """Consecutive bytes of a file.

    Attributes:
        start, length: of the bytes in the file.
        label: what to call them in messages, for example ``model.zip/release/mp_rank_00/model_optim_rng.pt``.
        descriptor: of the file where it is open already; see :meth:`opened`.
    """

    path: Path
    start: int
    length: int
    label: str
    descriptor: int | None = None

    @staticmethod
    def whole(path: Path) -> FileRange:
        """All bytes of a file.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            # Before it is opened, which for a pipe would wait for its writer.
            if not stat.S_ISREG(path.stat().st_mode):
                raise DamagedFileError(
                    f"{path} is not a regular file", "give a checkpoint file, its folder or a zip file"
                )
            with path.open("rb") as file:
                return FileRange(path, 0, os.fstat(file.fileno()).st_size, str(path))
        except OSError as error:
            raise DamagedFileError(f"{path} cannot be read ({error.strerror})", "check the path") from None

    def part(self, start: int, length: int, label: str | None = None) -> FileRange:
        """Bytes inside this range.

        Raises:
            UserError: they reach beyond its end.
        """
        if start < 0 or length < 0 or start + length > self.length:
            raise DamagedFileError(
                f"{self.label} is damaged: it should hold {length} bytes at offset {start}, but ends at {self.length}"
            )
        return FileRange(self.path, self.start + start, length, label or self.label, self.descriptor)

    @contextmanager
    def opened(self) -> Iterator[FileRange]:
        """The same range, of whose parts the reading opens no file again; of use inside the block only."""
        if self.descriptor is not None:
            yield self
            return
        with reporting("read", self.label, _REMEDY):
            descriptor = os.open(self.path, os.O_RDONLY)
        try:
            yield replace(self, descriptor=descriptor)
        finally:
            os.close(descriptor)

    def open(self) -> io.BufferedReader:
        """The bytes as a seekable binary file."""
        return io.BufferedReader(_RangeReader(self))

    def read(self, start: int, length: int) -> bytearray:
        """Bytes ``start`` to ``start + length``, in memory of their own.

        Raises:
            UserError: they reach beyond the range, or the file became shorter.
        """
        data = bytearray(length)
        view = memoryview(data)
        done = 0
        with reporting("read", self.label, _REMEDY), self.part(start, length).opened() as wanted:
            assert wanted.descriptor is not None
            while done < length:
                # A read is interrupted at 2 GiB by the kernel, and may return less at any time.
                count = os.preadv(wanted.descriptor, [view[done:]], wanted.start + done)
                if not count:
                    raise self._shorter()
                done += count
        return data

    def content(self, most: int | None = None) -> bytes:
        """The first bytes, at most so many; all of them where None."""
        return bytes(self.read(0, self.length if most is None else min(self.length, most)))

    def map(self, start: int, length: int) -> memoryview:
        """The same bytes as :meth:`read` gives, mapped: they come from the file as they are looked at.

        What is written to them stays in memory. There must be at least one, and the file must not become shorter.

        Raises:
            UserError: they reach beyond the range, or the file became shorter.
        """
        offset = self.start + start
        lead = offset % mmap.ALLOCATIONGRANULARITY
        with reporting("read", self.label, _REMEDY), self.part(start, length).opened() as wanted:
            assert wanted.descriptor is not None
            if os.fstat(wanted.descriptor).st_size < offset + length:
                raise self._shorter()
            pages = mmap.mmap(wanted.descriptor, lead + length, access=mmap.ACCESS_COPY, offset=offset - lead)
        return memoryview(pages)[lead:]

    def _shorter(self) -> DamagedFileError:
        return DamagedFileError(f"{self.label} became shorter while it was read", "read a copy that stays as it is")


class _RangeReader(io.RawIOBase):
    """A raw file over a range, for libraries that want a file."""

    def __init__(self, place: FileRange) -> None:
        self._stack = ExitStack()
        self._range, self._at = self._stack.enter_context(place.opened()), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._range.length}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        room = max(0, min(len(buffer), self._range.length - self._at))
        assert self._range.descriptor is not None
        with reporting("read", self._range.label, _REMEDY):
            count = os.preadv(self._range.descriptor, [memoryview(buffer)[:room]], self._range.start + self._at)
        self._at += count
        return count

    def close(self) -> None:
        self._stack.close()
        super().close()
