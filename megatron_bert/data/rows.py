# SPDX-License-Identifier: Apache-2.0
"""One document as it lies in a file, and its text."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_bert.data.compression import PlainFile, open_plain
from parallel.errors import UserError

OnBadRow = Literal["error", "skip"]

Form = Literal["json", "text", "cell", "null"]
"""A JSON object, plain text, a value of a table's column, or a value that is missing there."""


class Row(NamedTuple):
    """One document as it lies in a file: the bytes of a JSON object, of plain lines or of a table's value.

    Attributes:
        line: Number of its first line, or of the row of a table, from 1.
        data: The bytes, without line end.
        offset: Where it begins: byte of the (decompressed) file, or what counts rows in a table.
        base: Where `line` is counted from: a byte of the file, or a batch of rows; 0 is the start.
    """

    path: str
    line: int
    data: bytes
    form: Form
    offset: int = 0
    base: int = 0

    @property
    def where(self) -> str:
        """The place, for messages."""
        if self.form in ("cell", "null"):
            return f"{self.path} row {self.line}" + (f" of record batch {self.base}" if self.base else "")
        return f"{self.path} line {self.line}" + (f" after byte {self.base}" if self.base else "")


class Reader(ABC):
    """The documents of one file.

    Every document has a position in [0, size), which never falls from one to the next: a range of positions is a
    part of the file, and parts that meet hold every document once.

    Attributes:
        path: The file, as messages name it.
        size: Its bytes, compressed or not.
        cut: Offset of the first document at or after the end of the range read last; None at the end of the file.
    """

    def __init__(self, path: str | os.PathLike[str], size: int | None = None) -> None:
        self.path = os.fspath(path)
        self.size = Path(self.path).stat().st_size if size is None else size
        self.cut: int | None = None
        self._plain: PlainFile | None = None
        self._bytes_read = 0

    @abstractmethod
    def rows(self, begin: int = 0, end: int | None = None) -> Iterator[Row]:
        """Documents whose position is in [begin, end), in order; all of them by default.

        Raises:
            UserError: The file cannot be read, or is not what its name says.
        """

    @property
    def bytes_read(self) -> int:
        """Bytes of the (compressed) file consumed so far."""
        return self._bytes_read if self._plain is None else self._plain.bytes_read()

    @contextmanager
    def _opened(self, path: str) -> Iterator[PlainFile]:
        """The content of the file, and how much of it is consumed."""
        with open_plain(path) as plain:
            self._plain = plain
            try:
                yield plain
            finally:
                self._bytes_read, self._plain = plain.bytes_read(), None


def decode_row(row: Row, json_key: str = "text") -> str:
    """The text of a document.

    Raises:
        UserError: Invalid UTF-8 or JSON, or no string under `json_key`; names file and line.
    """
    if row.form == "null":
        raise UserError(f'{row.where} is null in column "{json_key}": skip such rows with --on-bad-row skip.')
    try:
        text = row.data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = row._replace(line=row.line + (row.data.count(b"\n", 0, error.start) if row.form == "text" else 0))
        column = error.start - (row.data.rfind(b"\n", 0, error.start) + 1)
        unit = "value" if row.form == "cell" else "line"
        raise UserError(f"{line.where} is not UTF-8 at byte {column} of the {unit}: convert the file.") from None
    return _text_of_object(row, text, json_key) if row.form == "json" else text


_JSON_KINDS = {type(None): "null", bool: "a truth value", list: "an array", dict: "an object"}


def _text_of_object(row: Row, text: str, json_key: str) -> str:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{row.where} is not JSON ({error}): every line must be one JSON object.") from None
    if not isinstance(document, dict) or json_key not in document:
        found = ", ".join(list(document)[:8]) if isinstance(document, dict) else type(document).__name__
        raise UserError(f'{row.where} has no key "{json_key}" (found: {found}): name the text with --json-key.')
    content = document[json_key]
    if not isinstance(content, str):
        kind = _JSON_KINDS.get(type(content), "a number")
        raise UserError(
            f'{row.where} holds {kind} under "{json_key}", expected a string: skip such rows with --on-bad-row skip.'
        )
    if b"\\u" in row.data:
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                f'{row.where} holds half of a surrogate pair under "{json_key}": it is not valid text.'
            ) from None
    return content


def check_on_bad_row(on_bad_row: str) -> None:
    """Refuse anything but "error" and "skip"."""
    if on_bad_row not in ("error", "skip"):
        raise UserError(f'on_bad_row "{on_bad_row}" is unknown: choose error or skip.')
