"""Where checkpoint bytes lie: ranges of files, and trees of named ranges (a folder, one file, or an archive).

Readers ask a tree for a name and get a :class:`FileRange`, so they do not know whether a checkpoint lies in a folder or
inside a zip file. Nothing is read until a range is opened.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import UserError

#: Folders below a checkpoint folder that are searched for its files: iter_0001000/mp_rank_00/ is two.
_DEPTH = 3
#: More entries than this are no checkpoint, but a folder named by mistake (a home directory).
_MOST_ENTRIES = 100_000


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
        with wanted.path.open("rb", buffering=0) as file:
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

    def readinto(self, buffer) -> int:
        room = max(0, min(len(buffer), self._range.length - self._at))
        self._file.seek(self._range.start + self._at)
        count = self._file.readinto(memoryview(buffer)[:room])
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class FileTree(Mapping[str, FileRange]):
    """Names (relative, with forward slashes) and the bytes they stand for.

    Attributes:
        label: what to call the tree in messages.
        folder: the folder it was made from, or None when it is no folder on disk.
    """

    def __init__(self, label: str, files: dict[str, Path | FileRange], folder: Path | None = None) -> None:
        self.label, self.folder, self._files = label, folder, files

    def __getitem__(self, name: str) -> FileRange:
        place = self._files[name]
        return place if isinstance(place, FileRange) else FileRange.whole(place)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files


def folder_tree(folder: Path) -> FileTree:
    """The files of a folder and of the folders in it.

    Raises:
        UserError: it cannot be listed, or holds far too much.
    """
    files: dict[str, Path | FileRange] = {}

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}): check its permissions")

    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        where = Path(root).relative_to(folder)
        if len(where.parts) >= _DEPTH:
            folders.clear()
        for name in sorted(names):
            files[(where / name).as_posix()] = Path(root, name)
        if len(files) > _MOST_ENTRIES:
            raise UserError(f"{folder} holds more than {_MOST_ENTRIES} files: name the folder of one checkpoint")
    return FileTree(str(folder), files, folder)


def file_tree(path: Path) -> FileTree:
    """A tree of one file."""
    return FileTree(str(path), {path.name: path})
