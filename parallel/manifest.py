# SPDX-License-Identifier: Apache-2.0
"""A checksum for every block of every file of a checkpoint, so that what changed on a disk is not taken for weights.

``manifest.json`` lies in the checkpoint and lists its files with their sizes and the CRC-32 of each block of
:data:`BLOCK_BYTES` bytes. Writers take the checksums from the bytes that they hand to the file system, and readers
check each block that they need, once, before they use what is in it.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from parallel.errors import DamagedFileError, brief
from parallel.whole_files import reason_of, whole_file

MANIFEST_FILE = "manifest.json"
BLOCK_BYTES = 1 << 20
_VERSION = 1
_REMEDY = "use another checkpoint"


@dataclass(frozen=True)
class FileSums:
    """What a file should hold.

    Attributes:
        size: in bytes.
        sums: CRC-32 of each block, of which the last may be shorter.
    """

    size: int
    sums: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """For a manifest; eight hexadecimal digits a block."""
        return {"bytes": self.size, "crc32": "".join(f"{number:08x}" for number in self.sums)}

    @staticmethod
    def from_json(value: Any) -> FileSums:
        """What :meth:`as_json` made.

        Raises:
            ValueError: it is something else.
        """
        size, digits = value["bytes"], value["crc32"]
        if type(size) is not int or size < 0 or not isinstance(digits, str):
            raise ValueError("sizes and checksums of other types")
        if len(digits) != 8 * -(-size // BLOCK_BYTES):
            raise ValueError(f"{len(digits)} digits of checksums for {size} bytes")
        return FileSums(size, tuple(int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)))


class SummingFile(io.RawIOBase):
    """A file that is written from start to end, and the checksums of its blocks.

    Args:
        file: opened for writing, in bytes; closed with this one.

    Attributes:
        refused: the first error of the file system, which native code between here and the caller loses.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._size, self._sums, self._last = file, 0, list[int](), 0
        self.refused: OSError | None = None

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: Any) -> int:
        """Append bytes."""
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self.refused = self.refused or error
            raise
        at = 0
        while at < len(view):
            room = BLOCK_BYTES - self._size % BLOCK_BYTES
            part = view[at : at + room]
            self._last = zlib.crc32(part, self._last)
            self._size += len(part)
            at += len(part)
            if self._size % BLOCK_BYTES == 0:
                self._sums.append(self._last)
                self._last = 0
        return len(view)

    def tell(self) -> int:
        """Number of bytes written."""
        return self._size

    def flush(self) -> None:
        """Hand everything to the file system."""
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        """Of the file, with everything handed to the file system: whoever asks is about to sync it."""
        self._file.flush()
        return self._file.fileno()

    def close(self) -> None:
        """Close the file as well."""
        if not self.closed:
            self._file.close()
        super().close()

    def sums(self) -> FileSums:
        """Of all that was written."""
        return FileSums(self._size, (*self._sums, *([self._last] if self._size % BLOCK_BYTES else [])))


def write_manifest(directory: Path, known: Mapping[str, FileSums] | None = None) -> int:
    """List every file of a directory; the size of all of them in bytes.

    Args:
        known: name -> what its writer has written; of other files, what they hold.
    """
    files = {
        path.name: (known or {}).get(path.name) or _sums_of(path)
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name != MANIFEST_FILE
    }
    with whole_file(directory / MANIFEST_FILE, sync=True) as file:
        listed = {name: sums.as_json() for name, sums in files.items()}
        json.dump({"version": _VERSION, "block_bytes": BLOCK_BYTES, "files": listed}, file, indent=1)
    return sum(sums.size for sums in files.values())


def _sums_of(path: Path) -> FileSums:
    with path.open("rb") as file:
        sums = [zlib.crc32(block) for block in iter(lambda: file.read(BLOCK_BYTES), b"")]
        return FileSums(file.tell(), tuple(sums))


class Manifest:
    """The checksums of a checkpoint.

    Args:
        files: name -> what the file should hold.
    """

    def __init__(self, directory: Path, files: dict[str, FileSums]) -> None:
        self.directory, self.files = directory, files
        self._checked: dict[str, set[int]] = {}

    @staticmethod
    def read(directory: Path) -> Manifest | None:
        """The manifest of a checkpoint; None for one without, as older versions wrote them.

        Raises:
            DamagedFileError: the manifest is damaged.
        """
        path = directory / MANIFEST_FILE
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if tree["version"] != _VERSION or tree["block_bytes"] != BLOCK_BYTES:
                raise ValueError(f"version {tree['version']!r}, blocks of {tree['block_bytes']!r} bytes")
            files = {name: FileSums.from_json(value) for name, value in tree["files"].items()}
            if strange := [name for name in files if name in ("", "..") or Path(name).name != name or "\0" in name]:
                raise ValueError(f"{strange[0]!r} is not the name of a file beside it")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedFileError(f"{path} cannot be read ({reason_of(error)})", _REMEDY) from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedFileError(f"{path} is damaged ({type(error).__name__}: {brief(error)})", _REMEDY) from None
        return Manifest(directory, files)

    def check_files(self) -> None:
        """Look for files that are missing, or have another size; nothing is read.

        Raises:
            DamagedFileError: the first that is wrong.
        """
        for name, expected in self.files.items():
            path = self.directory / name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DamagedFileError(f"{path} is missing ({reason_of(error)})", _REMEDY) from None
            if size != expected.size:
                raise DamagedFileError(f"{path} holds {size:,} bytes instead of {expected.size:,}", _REMEDY)

    def check_range(self, name: str, start: int = 0, length: int | None = None) -> None:
        """Compare bytes with what was written, those of whole blocks around a range that were not compared before.

        Args:
            start: first byte.
            length: number of bytes; None for all that follow.

        Raises:
            DamagedFileError: the file is not listed, cannot be read, or its bytes are not those that were written.
        """
        path, expected = self.directory / name, self.files.get(name)
        if expected is None:
            raise DamagedFileError(f"{path} is not in {MANIFEST_FILE}, so it was not written with it", _REMEDY)
        end = expected.size if length is None else start + length
        checked = self._checked.setdefault(name, set())
        wanted = [n for n in range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES)) if n not in checked]
        if not wanted:
            return
        try:
            with path.open("rb", buffering=0) as file:
                for number in wanted:
                    data, at = _read_block(file, number), number * BLOCK_BYTES
                    if number >= len(expected.sums) or zlib.crc32(data) != expected.sums[number]:
                        raise DamagedFileError(
                            f"{path} has changed since it was written (checksum of bytes {at:,} to {at + len(data):,})",
                            _REMEDY,
                        )
        except OSError as error:
            raise DamagedFileError(f"{path} cannot be read ({reason_of(error)})", _REMEDY) from None
        checked.update(wanted)

    def check_everything(self) -> None:
        """Read every file and compare it.

        Raises:
            DamagedFileError: the first that is wrong.
        """
        self.check_files()
        for name in self.files:
            self.check_range(name)


def _read_block(file: io.RawIOBase, number: int) -> memoryview:
    file.seek(number * BLOCK_BYTES)
    data, done = memoryview(bytearray(BLOCK_BYTES)), 0
    while done < BLOCK_BYTES and (count := file.readinto(data[done:])):
        done += count
    return data[:done]
