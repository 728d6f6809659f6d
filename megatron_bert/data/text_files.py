# SPDX-License-Identifier: Apache-2.0
"""Streaming documents out of text files: JSON lines or plain text, compressed or not."""

import os
from collections.abc import Iterator
from pathlib import Path

from megatron_bert.data.compression import DAMAGE, STANDARD_INPUT, PlainFile, inner_suffix
from megatron_bert.data.rows import Reader, Row
from parallel.errors import UserError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RowReader(Reader):
    """Reads the documents of one file without decoding them, which is left to whoever uses them.

    Files named .json, .jsonl or .ndjson hold one JSON object per line; files named .txt hold documents separated by
    blank lines; of other names the first character decides ("{" means JSON). A further .gz, .bz2, .xz or .zst is
    undone. The position of a JSON line is its first byte, that of a plain document the first byte of the line before
    it; in a compressed file it is the block of the file which that byte came of.

    Args:
        path: The file; "-" is standard input.

    Raises:
        UserError: The file is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        if self._path == STANDARD_INPUT:
            super().__init__("standard input", 0)
            return
        if not Path(path).is_file():
            raise UserError(f"Input {self._path} does not exist or is not a file: give JSON lines or plain text files.")
        super().__init__(path)

    def __iter__(self) -> Iterator[Row]:
        """All documents."""
        return self.rows()

    def rows(self, begin: int = 0, end: int | None = None) -> Iterator[Row]:
        """Documents whose position is in [begin, end), in order; blank JSON lines are passed over.

        Raises:
            UserError: The file cannot be read, or is not what its compression suffix says.
        """
        line = [0]
        self.cut = None
        try:
            with self._opened(self._path) as plain:
                yield from self._rows(plain, begin, end, line)
        except DAMAGE as error:
            raise UserError(f"{self.path} cannot be read after line {line[0]}: {error}.") from None

    def _rows(self, plain: PlainFile, begin: int, end: int | None, count: list[int]) -> Iterator[Row]:
        first = plain.file.readline()
        is_json = _holds_json(self._path, first.removeprefix(BYTE_ORDER_MARK))
        base = 0
        if begin and plain.seekable:
            plain.file.seek(begin - 1)
            base = begin - 1 + len(plain.file.readline())
            first = plain.file.readline()
        yield from (self._json_rows if is_json else self._text_rows)(plain, first, base, begin, end, count)

    def _json_rows(
        self, plain: PlainFile, text: bytes, base: int, begin: int, end: int | None, count: list[int]
    ) -> Iterator[Row]:
        offset, whole = base, not begin and end is None
        while text:
            count[0] += 1
            stripped = (text if offset else text.removeprefix(BYTE_ORDER_MARK)).rstrip(b"\r\n")
            if stripped.strip():
                place = 0 if whole else plain.position(offset)
                if end is not None and place >= end:
                    self.cut = offset
                    return
                if place >= begin:
                    yield Row(self.path, count[0], stripped, "json", offset, base)
            offset += len(text)
            text = plain.file.readline()

    def _text_rows(
        self, plain: PlainFile, text: bytes, base: int, begin: int, end: int | None, count: list[int]
    ) -> Iterator[Row]:
        offset, whole = base, not begin and end is None
        # Position of the line before the document; None in the middle of a document that belongs to the part before.
        place = None if base else 0
        block: list[bytes] = []
        start = 0
        while text:
            count[0] += 1
            stripped = (text if offset else text.removeprefix(BYTE_ORDER_MARK)).rstrip(b"\r\n")
            if stripped.strip():
                if not block and place is not None and end is not None and place >= end:
                    self.cut = offset
                    return
                start = start if block else offset
                block.append(stripped)
            else:
                if block and place is not None and place >= begin:
                    yield Row(self.path, count[0] - len(block), b"\n".join(block), "text", start, base)
                block = []
                place = 0 if whole else plain.position(offset)
            offset += len(text)
            text = plain.file.readline()
        if block and place is not None and place >= begin:
            yield Row(self.path, count[0] + 1 - len(block), b"\n".join(block), "text", start, base)


def _holds_json(path: str, first_line: bytes) -> bool:
    suffix = inner_suffix(path)
    if suffix in JSON_SUFFIXES or suffix in TEXT_SUFFIXES:
        return suffix in JSON_SUFFIXES
    return first_line.lstrip().startswith(b"{")
