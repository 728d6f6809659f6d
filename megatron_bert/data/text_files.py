"""Streaming documents out of text files: JSON lines or plain text, gzip or Zstandard compressed or not."""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast

import zstandard

from parallel.errors import UserError

OnBadRow = Literal["error", "skip"]

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
READ_BYTES = 1 << 17


class Row(NamedTuple):
    """One document as it lies in a file: the bytes of a JSON line or of a block of plain lines.

    Attributes:
        path: The file.
        line: Number of its first line, from 1.
        data: The bytes, without line end.
        is_json: Whether `data` is a JSON object.
    """

    path: str
    line: int
    data: bytes
    is_json: bool


class RowReader:
    """Iterates over the documents of one file without decoding them, which is left to whoever uses them.

    Files named .json, .jsonl or .ndjson hold one JSON object a line; files named .txt hold documents separated by
    blank lines; of other names the first character decides ("{" means JSON). A further .gz or .zst is undone.

    Attributes:
        bytes_read: Bytes of the (compressed) file consumed so far.

    Raises:
        UserError: The file is missing, or not what its compression suffix says.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        if not Path(self.path).is_file():
            raise UserError(f"Input {self.path} does not exist or is not a file: give JSON lines or plain text files.")
        self.bytes_read = 0

    def __iter__(self) -> Iterator[Row]:
        """The documents in order; blank JSON lines are passed over."""
        line = 0
        with Path(self.path).open("rb") as raw:
            lines = iter(_decompressed(self.path, raw))
            try:
                first = next(lines, b"").removeprefix(BYTE_ORDER_MARK)
                is_json = _holds_json(self.path, first)
                block: list[bytes] = []
                text: bytes | None = first
                while text is not None:
                    line += 1
                    text = text.rstrip(b"\r\n")
                    blank = not text.strip()
                    if is_json and not blank:
                        yield Row(self.path, line, text, True)
                    elif not is_json and not blank:
                        block.append(text)
                    elif block:
                        yield Row(self.path, line - len(block), b"\n".join(block), False)
                        block = []
                    self.bytes_read = raw.tell()
                    text = next(lines, None)
            except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
                raise UserError(f"{self.path} cannot be read after line {line}: {error}.") from None
            if block:
                yield Row(self.path, line + 1 - len(block), b"\n".join(block), False)


def decode_row(row: Row, json_key: str = "text") -> str:
    """The text of a document.

    Raises:
        UserError: Invalid UTF-8 or JSON, or no string under `json_key`; names file and line.
    """
    where = f"{row.path} line {row.line}"
    try:
        text = row.data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = row.line + row.data.count(b"\n", 0, error.start)
        column = error.start - (row.data.rfind(b"\n", 0, error.start) + 1)
        raise UserError(
            f"{row.path} line {line} is not UTF-8 at byte {column} of the line: convert the file."
        ) from None
    if not row.is_json:
        return text
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}): every line must be one JSON object.") from None
    if not isinstance(document, dict) or json_key not in document:
        found = ", ".join(list(document)[:8]) if isinstance(document, dict) else type(document).__name__
        raise UserError(f'{where} has no key "{json_key}" (found: {found}): name the text with --json-key.')
    content = document[json_key]
    if not isinstance(content, str):
        raise UserError(f'{where} holds {type(content).__name__} under "{json_key}": expected a string.')
    if b"\\u" in row.data:
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                f'{where} holds half of a surrogate pair under "{json_key}": it is no valid text.'
            ) from None
    return content


class DocumentReader:
    """Iterates over the texts of all documents of some files.

    Args:
        paths: The files, read one after the other.
        json_key: Where a JSON line holds its text.
        on_bad_row: "error" stops at a row that cannot be decoded, "skip" counts it and goes on.

    Attributes:
        skipped: Rows skipped so far.
        bytes_read: Bytes of the (compressed) files consumed so far.
    """

    def __init__(
        self, paths: list[str] | list[Path], *, json_key: str = "text", on_bad_row: OnBadRow = "error"
    ) -> None:
        check_on_bad_row(on_bad_row)
        self._readers = [RowReader(path) for path in paths]
        self._json_key, self._on_bad_row = json_key, on_bad_row
        self.skipped = 0

    def __iter__(self) -> Iterator[str]:
        for reader in self._readers:
            for row in reader:
                try:
                    text = decode_row(row, self._json_key)
                except UserError:
                    if self._on_bad_row == "error":
                        raise
                    self.skipped += 1
                    continue
                yield text

    @property
    def bytes_read(self) -> int:
        """Bytes of the (compressed) files consumed so far."""
        return sum(reader.bytes_read for reader in self._readers)


def check_on_bad_row(on_bad_row: str) -> None:
    """Refuse anything but "error" and "skip"."""
    if on_bad_row not in ("error", "skip"):
        raise UserError(f'on_bad_row "{on_bad_row}" is unknown: choose error or skip.')


def _holds_json(path: str, first_line: bytes) -> bool:
    suffix = Path(path).suffix
    if suffix in (".gz", ".zst"):
        suffix = Path(path).with_suffix("").suffix
    if suffix in JSON_SUFFIXES or suffix in TEXT_SUFFIXES:
        return suffix in JSON_SUFFIXES
    return first_line.lstrip().startswith(b"{")


def _decompressed(path: str, raw: BinaryIO) -> BinaryIO:
    if path.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if path.endswith(".zst"):
        return cast(BinaryIO, io.BufferedReader(_ZstandardFile(raw), READ_BYTES))
    return raw


class _ZstandardFile(io.RawIOBase):
    """Decompresses one or more frames; unlike the library's stream reader it notices a truncated file."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._plain:
            self._compressed = self._compressed or self._raw.read(READ_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the compressed file ends inside a frame")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._plain = self._frame.decompress(self._compressed)
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count
