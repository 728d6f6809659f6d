# SPDX-License-Identifier: Apache-2.0
"""Reading files of rows: tables separated by tabs or commas, JSON lines, and JSON arrays."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from megatron_bert.data.text_files import BYTE_ORDER_MARK
from megatron_bert.tasks.rows import BadRows, Row, RowError, check_text, checked_object, parse_object
from megatron_bert.tasks.settings import TaskDataSettings
from parallel.errors import UserError

TableKind = Literal["tsv", "csv", "jsonl"]

FORMATS: dict[str, TableKind] = {
    ".tsv": "tsv",
    ".txt": "tsv",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
}
"""File ending -> format."""

_NO_TEXT = {
    b"PAR1": "a Parquet file: write its rows as JSON lines",
    b"\x1f\x8b": "compressed by gzip: unpack it",
    b"PK\x03\x04": "a zip archive: unpack it",
}
"""First bytes of a file -> what it is, and what to do."""


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a file with their numbers, from 1, without line ends.

    A byte order mark and carriage returns before line feeds are removed. Only line feeds end a line: other Unicode line
    separators are text. Bytes that are not UTF-8 come as lone surrogates, which `check_text` finds.

    Raises:
        UserError: the file cannot be read, or is not text.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    for start, what in _NO_TEXT.items():
                        if line.startswith(start):
                            raise UserError(f"{path} is {what}")
                    line = line.removeprefix(BYTE_ORDER_MARK)
                text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", errors="surrogateescape")
                yield number, text
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give an existing file") from None


def read_table(
    path: Path,
    kind: TableKind,
    header: bool,
    bad: BadRows,
    *,
    equal_widths: bool = True,
    numbers: Iterator[int] | None = None,
) -> Iterator[Row]:
    r"""Rows of a table, at least one; blank lines are passed over.

    Args:
        kind: "tsv": separated by tabs, quotes are plain text, as in GLUE. "csv": RFC 4180, a quoted cell may hold
            commas, doubled quotes and line ends. "jsonl": one JSON object per line, or one JSON array of objects.
        header: whether the first line of a tsv or csv file names the columns.
        bad: called with rows that cannot be read.
        equal_widths: whether all rows of a tsv or csv file must have the same number of columns.
        numbers: gives each row its number, so that those of several files go on; from 0 when unset.

    Raises:
        UserError: the file cannot be read, holds no row, or its header names a column twice.
    """
    numbers = itertools.count() if numbers is None else numbers
    if kind == "jsonl":
        yield from _read_json(path, bad, numbers)
        return
    names: tuple[str, ...] | None = None
    width, empty = 0, True
    for line, cells in read_cells(path, kind):
        if not cells:
            continue
        if header and names is None:
            names = column_names(path, line, cells)
            width = len(names)
            continue
        number, empty = next(numbers), False
        try:
            values = checked_cells(cells)
            if equal_widths and width and len(values) != width:
                raise RowError(f"it has {len(values)} columns, expected {width}")
        except RowError as reason:
            bad.add(path, f"line {line}", reason)
            continue
        width = width or len(values)
        yield Row(path, line, number, values, names)
    if empty:
        raise no_rows(path, only_names=names is not None)


def table_rows(path: Path, data: TaskDataSettings, bad: BadRows, numbers: Iterator[int] | None = None) -> Iterator[Row]:
    """Rows of a file in the format that the settings give, or its ending shows; see `read_table`.

    Raises:
        UserError: as there, or the format is unknown or means nothing here.
    """
    kind = data.format or FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path} does not show its format by its ending: set data.format: tsv, csv or jsonl")
    if kind not in ("tsv", "csv", "jsonl"):
        raise UserError(f"data.format {kind} is for other tasks: set tsv, csv or jsonl")
    if kind == "jsonl" and not data.header:
        raise UserError(f"data.header: false is for tsv and csv, but {path} holds JSON: leave it out")
    return read_table(path, kind, data.header, bad, numbers=numbers)


def no_rows(path: Path, *, only_names: bool = False) -> UserError:
    """The error of a file without rows."""
    what = "names its columns in line 1, but holds no usable row" if only_names else "is empty"
    return UserError(f"{path} {what}: give a file with rows")


def column_names(path: Path, line: int, cells: list[str] | RowError) -> tuple[str, ...]:
    """The columns' names, from the first line.

    Raises:
        UserError: they are not text, or name a column twice.
    """
    try:
        cells = checked_cells(cells)
    except RowError as reason:
        raise UserError(f"{path} line {line}, the names of the columns, cannot be used: {reason}") from None
    if len(set(cells)) != len(cells):
        raise UserError(f"{path} line {line} names a column twice: {', '.join(cells)}")
    return tuple(cells)


def checked_cells(cells: list[str] | RowError) -> list[str]:
    """The cells of a line (RowError where it could not be read)."""
    if isinstance(cells, RowError):
        raise cells
    for cell in cells:
        check_text(cell)
    return cells


def read_cells(path: Path, kind: Literal["tsv", "csv"]) -> Iterator[tuple[int, list[str] | RowError]]:
    """Line numbers, from 1, and cells; no cells where a line is empty, and why where it cannot be read."""
    return _read_csv(path) if kind == "csv" else _read_tsv(path)


def _read_tsv(path: Path) -> Iterator[tuple[int, list[str] | RowError]]:
    for line, text in read_lines(path):
        yield line, text.split("\t") if text else []


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
        yield taken[0][0], cells


def _read_json(path: Path, bad: BadRows, numbers: Iterator[int]) -> Iterator[Row]:
    array = read_array(path)
    if array is not None:
        read: Iterable[tuple[int, Any]] = enumerate(array, start=1)
    else:
        read = ((line, text) for line, text in read_lines(path) if text.strip())
    empty = True
    for line, given in read:
        number, empty = next(numbers), False
        row = Row(path, line, number, (), (), "line" if array is None else "item")
        try:
            values = parse_object(given) if array is None else checked_object(given)
        except RowError as reason:
            bad.add(path, row.place, reason)
            continue
        yield Row(path, line, number, list(values.values()), tuple(values), row.unit)
    if empty:
        raise no_rows(path)


def read_array(path: Path) -> list[Any] | None:
    """The items of a file that is one JSON array; None where it is anything else, such as JSON lines.

    Raises:
        UserError: it begins as an array does, and is not JSON.
    """
    first = next((text for _, text in read_lines(path) if text.strip()), "")
    if not first.lstrip().startswith("["):
        return None
    try:
        content = json.loads(path.read_bytes().removeprefix(BYTE_ORDER_MARK))
    except (ValueError, RecursionError) as error:
        try:
            parse_object(first)
        except RowError as reason:
            if "not JSON" not in str(reason):
                return None  # a line of its own, which is bad
        raise UserError(f"{path} begins as a JSON array does, but is not JSON ({error}): fix it") from None
    return content


def first_row(path: Path, kind: TableKind) -> dict[str, Any] | None:
    """The first row of a JSON file, or names of a table's columns; None where it cannot be read."""
    if kind == "jsonl":
        row = next(_read_json(path, BadRows("skip"), itertools.count()), None)
        return None if row is None else dict(zip(row.names or (), row.cells, strict=True))
    line = next((cells for _, cells in read_cells(path, kind) if cells), None)
    return None if line is None or isinstance(line, RowError) else dict.fromkeys(line)
