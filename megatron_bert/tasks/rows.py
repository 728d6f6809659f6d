"""Reading rows of text files, and what happens to malformed ones."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_bert.data.text_files import BYTE_ORDER_MARK
from parallel.errors import UserError

KEPT_REASONS = 5
"""Reasons of skipped rows that are kept for the report; the others are only counted."""


class RowError(Exception):
    """A row cannot be used; the text says why."""


class BadRows:
    """What to do with malformed rows, and which there were.

    Attributes:
        policy: "error" or "skip".
        skipped: file -> rows skipped.
        reasons: place and reason of the first few.
    """

    def __init__(self, policy: Literal["error", "skip"]) -> None:
        self.policy = policy
        self.skipped: dict[str, int] = {}
        self.reasons: list[str] = []

    @property
    def count(self) -> int:
        """Rows skipped in all files."""
        return sum(self.skipped.values())

    def add(self, path: Path, place: str, reason: RowError) -> None:
        """Stop at a bad row, or count it.

        Raises:
            UserError: the policy is "error".
        """
        message = f"{path} {place}: {reason}"
        if self.policy == "error":
            raise UserError(f"{message}; mend it, or set data.on_bad_row: skip")
        self.skipped[str(path)] = self.skipped.get(str(path), 0) + 1
        if len(self.reasons) < KEPT_REASONS:
            self.reasons.append(message)


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        path: its file.
        line: number of its first line, from 1.
        number: how many rows came before it, malformed ones included.
        cells: its values; strings, or any JSON value.
        names: names of the columns; None where they have none.
    """

    path: Path
    line: int
    number: int
    cells: Sequence[Any]
    names: tuple[str, ...] | None

    @property
    def where(self) -> str:
        """File and line."""
        return f"{self.path} line {self.line}"

    def has(self, column: str | int) -> bool:
        """Whether the row has such a column."""
        if isinstance(column, str):
            return self.names is not None and column in self.names
        return -len(self.cells) <= column < len(self.cells)

    def value(self, column: str | int) -> Any:
        """The value in a column.

        Raises:
            RowError: there is no such column.
        """
        if not self.has(column):
            found = ", ".join(self.names[:12]) if self.names is not None else f"{len(self.cells)} columns without names"
            raise RowError(f"it has no column {column!r} (found: {found})")
        if isinstance(column, str):
            assert self.names is not None
            column = self.names.index(column)
        return self.cells[column]

    def text(self, column: str | int) -> str:
        """The text in a column.

        Raises:
            RowError: there is no such column, or it does not hold text.
        """
        value = self.value(column)
        if not isinstance(value, str):
            raise RowError(f"column {column!r} holds {json.dumps(value)[:40]}, expected text")
        return value


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a file with their numbers, from 1, without line ends.

    A byte order mark and carriage returns before line feeds are removed. Only line feeds end a line: other Unicode line
    separators are text. Bytes that are not UTF-8 come as lone surrogates, which `check_text` finds.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", errors="surrogateescape")
                yield number, text
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give an existing file") from None


def file_fingerprint(path: Path) -> dict[str, Any]:
    """Path, sha256 (64 hex digits) and size in bytes, by which to tell whether two runs had the same data.

    Of a directory: of the relative names and the contents of all *.txt files below it.
    """
    if path.is_file():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"path": str(path), "sha256": digest, "bytes": path.stat().st_size}
    together, size = hashlib.sha256(), 0
    for part in sorted(path.rglob("*.txt")):
        found = file_fingerprint(part)
        together.update(f"{part.relative_to(path).as_posix()}\0{found['sha256']}\n".encode())
        size += found["bytes"]
    return {"path": str(path), "sha256": together.hexdigest(), "bytes": size}


def check_text(text: str) -> None:
    """Refuse text that was not UTF-8, and NUL characters, which no text holds.

    Raises:
        RowError: with the column, in characters from 1.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"it is not UTF-8 at character {error.start + 1}: convert the file") from None
    if "\0" in text:
        raise RowError(f"it holds a NUL character at character {text.index(chr(0)) + 1}")


def read_table(
    path: Path, kind: Literal["tsv", "csv", "jsonl"], header: bool, bad: BadRows, *, equal_widths: bool = True
) -> Iterator[Row]:
    r"""Rows of a table; blank lines are passed over.

    Args:
        path: the file.
        kind: "tsv": separated by tabs, quotes are plain text, as in GLUE. "csv": RFC 4180, a quoted cell may hold
            commas, doubled quotes and line ends. "jsonl": one JSON object a line.
        header: whether the first line of a tsv or csv file names the columns.
        bad: told of rows that cannot be read.
        equal_widths: whether all rows of a tsv or csv file must have the same number of columns.

    Raises:
        UserError: the file cannot be read, or its header names a column twice.
    """
    if kind == "jsonl":
        yield from _read_json_lines(path, bad)
        return
    names: tuple[str, ...] | None = None
    width, number = 0, -1
    read: Iterable[tuple[int, list[str] | RowError]] = _read_csv(path) if kind == "csv" else _read_tsv(path)
    for line, cells in read:
        if header and names is None:
            names = _names(path, line, cells)
            width = len(names)
            continue
        number += 1
        try:
            values = _checked(cells)
            if equal_widths and width and len(values) != width:
                raise RowError(f"it has {len(values)} columns, expected {width}")
        except RowError as reason:
            bad.add(path, f"line {line}", reason)
            continue
        width = width or len(values)
        yield Row(path, line, number, values, names)


def _names(path: Path, line: int, cells: list[str] | RowError) -> tuple[str, ...]:
    """The columns' names, from the first line."""
    try:
        cells = _checked(cells)
    except RowError as reason:
        raise UserError(f"{path} line {line}, the names of the columns, cannot be used: {reason}") from None
    if len(set(cells)) != len(cells):
        raise UserError(f"{path} line {line} names a column twice: {', '.join(cells)}")
    return tuple(cells)


def _checked(cells: list[str] | RowError) -> list[str]:
    if isinstance(cells, RowError):
        raise cells
    for cell in cells:
        check_text(cell)
    return cells


def _read_tsv(path: Path) -> Iterator[tuple[int, list[str]]]:
    for line, text in read_lines(path):
        if text:
            yield line, text.split("\t")


def _read_csv(path: Path) -> Iterator[tuple[int, list[str] | RowError]]:
    csv.field_size_limit(sys.maxsize)  # a cell may hold a long document
    unread: deque[tuple[int, str]] = deque()
    rest = read_lines(path)
    taken: list[tuple[int, str]] = []

    def lines() -> Iterator[str]:
        while (numbered := unread.popleft() if unread else next(rest, None)) is not None:
            taken.append(numbered)
            yield numbered[1] + "\n"

    reader = csv.reader(lines(), strict=True)
    while True:
        taken.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield taken[0][0], RowError(f"it is not CSV ({error})")
            # A quote that nothing closes takes all that follows with it: that is read again, without its line.
            unread.extendleft(reversed(taken[1:]))
            reader = csv.reader(lines(), strict=True)
            continue
        if cells is None:
            return
        if cells:
            yield taken[0][0], cells


def _read_json_lines(path: Path, bad: BadRows) -> Iterator[Row]:
    number = -1
    for line, text in read_lines(path):
        if not text.strip():
            continue
        number += 1
        try:
            values = parse_object(text)
        except RowError as reason:
            bad.add(path, f"line {line}", reason)
            continue
        yield Row(path, line, number, list(values.values()), tuple(values))


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        RowError: it is not UTF-8, JSON or an object, or holds half of a surrogate pair.
    """
    check_text(text)
    try:
        values = json.loads(text)
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RowError("it holds half of a surrogate pair, which is no valid text") from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"it is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise RowError(f"it is a JSON {type(values).__name__}, expected an object")
    return values
