"""Consecutive bytes of a file, read when they are asked for."""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import UserError
from parallel.whole_files import reporting

_REMEDY = "check the disk, or use a copy of the file"


@dataclass(frozen=True)
class FileRange:
    """Consecutive bytes of a file.

    Attributes:
        path: of the file.
        start: offset of the first byte.
        length: number of bytes.
        label: what to call them in messages, for example ``model.zip/release/mp_rank_00/model_optim_rng.pt``.
    """

    path: Path
    start: int
    length: int
    label: str

    @staticmethod
    def whole(path: Path, label: str | None = None) -> FileRange:
        """All bytes of a file.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            # Before it is opened, which for a pipe would wait for its writer.
            if not stat.S_ISREG(path.stat().st_mode):
                raise UserError(f"{label or path} is no regular file: give a checkpoint file, its folder or a zip file")
            with path.open("rb") as file:
                return FileRange(path, 0, os.fstat(file.fileno()).st_size, label or str(path))
        except OSError as error:
            raise UserError(f"{label or path} cannot be read ({error.strerror}): check the path") from None

    def part(self, start: int, length: int, label: str | None = None) -> FileRange:
        """Bytes inside this range.

        Raises:
            UserError: they reach beyond its end.
        """
        if start < 0 or length < 0 or start + length > self.length:
            raise UserError(
                f"{self.label} is damaged: it should hold {length} bytes at offset {start}, but ends at {self.length}; "
                "fetch it again"
            )
        return FileRange(self.path, self.start + start, length, label or self.label)

    def open(self) -> io.BufferedReader:
        """The bytes as a seekable binary file."""
        return io.BufferedReader(_RangeReader(self))

    def read(self, start: int, length: int) -> bytearray:
        """Bytes ``start`` to ``start + length``, in memory of their own.

        Raises:
            UserError: they reach beyond the range, or the file became shorter.
        """
        wanted = self.part(start, length)
        data = bytearray(length)
        view = memoryview(data)
        done = 0
        with reporting("read", self.label, _REMEDY), wanted.path.open("rb", buffering=0) as file:
            file.seek(wanted.start)
            while done < length:
                # readinto is interrupted at 2 GiB by the kernel, and may return less at any time.
                count = file.readinto(view[done:])
                if not count:
                    raise UserError(
                        f"{self.label} became shorter while it was read: convert a copy that stays as it is"
                    )
                done += count
        return data


class _RangeReader(io.RawIOBase):
    """A raw file over a range, for libraries that want a file."""

    def __init__(self, place: FileRange) -> None:
        self._range, self._at = place, 0
        with reporting("read", place.label, _REMEDY):
            self._file = place.path.open("rb", buffering=0)

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

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        room = max(0, min(len(buffer), self._range.length - self._at))
        with reporting("read", self._range.label, _REMEDY):
            self._file.seek(self._range.start + self._at)
            count = self._file.readinto(memoryview(buffer)[:room])
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
