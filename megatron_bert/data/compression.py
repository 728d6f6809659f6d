# SPDX-License-Identifier: Apache-2.0
"""Reading files that may be compressed, with the place in the compressed file that each byte came from."""

import bz2
import io
import lzma
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from parallel.errors import UserError

READ_BYTES = 1 << 17

#: What the libraries raise for files that are damaged or not compressed.
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)

STANDARD_INPUT = "-"

#: Suffix -> a decompressor of one stream, frame or member; each has decompress, eof and unused_data.
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}
COMPRESSIONS = tuple(_DECOMPRESSORS)

#: First bytes -> the suffix of a file that begins so; of standard input, which has no name.
_SIGNATURES = {
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ\0": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PAR1": ".parquet",
    b"ARROW1": ".arrow",
}


def inner_suffix(path: str) -> str:
    """The suffix of a file name, without that of its compression, in lower case."""
    name = Path(path.lower())
    if name.suffix == ".tgz":
        return ".tar"
    return name.with_suffix("").suffix if name.suffix in COMPRESSIONS else name.suffix


class PlainFile:
    """A file's content, decompressed.

    Attributes:
        file: To read from.
        seekable: Whether `file` can be read from any byte; compressed files and pipes cannot.
    """

    def __init__(self, raw: BinaryIO, path: str) -> None:
        self._raw = raw
        suffix = Path(path.lower()).suffix
        start = _DECOMPRESSORS.get(".gz" if suffix == ".tgz" else suffix)
        self._stream = _Decompressed(raw, start) if start is not None else None
        self.file = raw if self._stream is None else cast(BinaryIO, io.BufferedReader(self._stream, READ_BYTES))
        self.seekable = self._stream is None and raw.seekable()

    def position(self, offset: int) -> int:
        """Where in the (compressed) file a byte lies; asked in ascending order, for bytes that have been read."""
        return offset if self._stream is None else self._stream.position(offset)

    def bytes_read(self) -> int:
        """Bytes of the (compressed) file consumed so far; of a pipe 0."""
        return self._raw.tell() if self._raw.seekable() else 0


@contextmanager
def open_plain(path: str) -> Iterator[PlainFile]:
    """Open a file and undo what its suffix says, or standard input for the path "-" and undo what its first bytes say.

    Raises:
        UserError: standard input is a table, which is read from its end.
    """
    if path == STANDARD_INPUT:
        piped = io.BufferedReader(cast(io.RawIOBase, sys.stdin.buffer), READ_BYTES)
        start = piped.peek(8)
        suffix = next((name for signature, name in _SIGNATURES.items() if start.startswith(signature)), "")
        if suffix and suffix not in COMPRESSIONS:
            raise UserError(f"Standard input is a {suffix} table, which no pipe can carry: give the file itself.")
        yield PlainFile(piped, suffix and f"x{suffix}")
        return
    with Path(path).open("rb") as raw:
        yield PlainFile(raw, path)


class _Decompressed(io.RawIOBase):
    """Decompresses one or more streams one after the other, and notices a truncated file."""

    def __init__(self, raw: BinaryIO, start: Callable[[], Any]) -> None:
        self._raw, self._start = raw, start
        self._current: Any = None
        self._compressed = b""
        self._plain = memoryview(b"")
        self._made = 0
        self._blocks: deque[tuple[int, int]] = deque([(0, 0)])  # first plain byte of a block, place of the block
        self._place = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._plain:
            if not self._compressed:
                place = self._raw.tell() if self._raw.seekable() else 0
                self._compressed = self._raw.read(READ_BYTES)
                self._blocks.append((self._made, place))
            if not self._compressed:
                if self._current is not None:
                    raise EOFError("the compressed file ends too early")
                return 0
            self._current = self._current or self._start()
            plain = self._current.decompress(self._compressed)
            self._plain = memoryview(plain)
            self._made += len(plain)
            self._compressed = b""
            if self._current.eof:
                # Streams may be padded with zeros to the blocks of a tape or a disk.
                self._compressed, self._current = self._current.unused_data.lstrip(b"\0"), None
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count

    def position(self, offset: int) -> int:
        """Place in the compressed file of the block that a plain byte came of."""
        while self._blocks and self._blocks[0][0] <= offset:
            self._place = self._blocks.popleft()[1]
        return self._place
