# SPDX-License-Identifier: Apache-2.0
"""Rows of data files: their values, what happens to malformed ones, and fingerprints of files."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from parallel.errors import UserError

KEPT_REASONS = 5
"""Reasons of skipped rows that are kept for the report; the others are only counted."""

Value = TypeVar("Value")


class RowError(Exception):
    """A row cannot be used; the text says why."""


class MissingColumnError(RowError):
    """A row lacks a column.

    Attributes:
        column: its name or position.
    """

    def __init__(self, column: str | int, row: Row) -> None:
        self.column = column
        super().__init__(f"it has no column {column!r} (found: {row.found})")


class BadRows:
    """What to do with malformed rows, and which there were.

    Attributes:
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
            raise UserError(f"{message}; fix it, or set data.on_bad_row: skip")
        self.skipped[str(path)] = self.skipped.get(str(path), 0) + 1
        if len(self.reasons) < KEPT_REASONS:
            self.reasons.append(message)


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        line: number of its first line, from 1; of an item of a JSON array, that of the item.
        number: how many rows came before it, malformed ones included.
        cells: its values; strings, or any JSON value.
        names: names of the columns; None where they have none.
        unit: what `line` counts.
    """

    path: Path
    line: int
    number: int
    cells: Sequence[Any]
    names: tuple[str, ...] | None
    unit: Literal["line", "item"] = "line"

    @property
    def place(self) -> str:
        """Where it is in its file."""
        return f"{self.unit} {self.line}"

    @property
    def where(self) -> str:
        """File and line."""
        return f"{self.path} {self.place}"

    @property
    def found(self) -> str:
        """The columns that it has, for messages."""
        if self.names is None:
            return f"{len(self.cells)} columns without names"
        text = ", ".join(self.names)
        return text if len(text) <= 120 else text[:117] + "..."

    def has(self, column: str | int) -> bool:
        """Whether the row has such a column."""
        if isinstance(column, str):
            return self.names is not None and column in self.names
        return -len(self.cells) <= column < len(self.cells)

    def value(self, column: str | int) -> Any:
        """The value in a column.

        Raises:
            MissingColumnError: there is no such column.
        """
        if not self.has(column):
            raise MissingColumnError(column, self)
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
            raise RowError(f"column {column!r} holds {as_json(value)}, expected text")
        return value

    def first_of(self, given: str | int | None, usual: Sequence[str]) -> str | int:
        """The column that the settings name, or else the first of the usual names that the row has."""
        if given is not None:
            return given
        return next((name for name in usual if self.has(name)), usual[0])


def as_json(value: Any) -> str:
    """A value for messages, as JSON writes it."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def converted(
    rows: Iterable[Row], convert: Callable[[Row], Value], bad: BadRows, *, columns: str = "see data.columns"
) -> Iterator[Value]:
    """What rows of one file hold; those that cannot be used go to `bad`.

    Args:
        rows: of one file.
        convert: makes something of a row, or raises RowError.
        columns: what to do where no row has a column that is needed; ends the sentence.

    Raises:
        UserError: a bad row, if they are errors; or no row has a column that is needed, whatever the policy.
    """
    rows = iter(rows)
    used = False
    lacked: set[str | int | None] = set()
    first: Row | None = None
    for row in rows:
        try:
            value = convert(row)
        except RowError as reason:
            column = reason.column if isinstance(reason, MissingColumnError) else None
            stops = bad.policy == "error" and not used
            if column is not None and stops and not any(other.has(column) for other in rows):
                raise no_such_column(row, column, columns) from None
            bad.add(row.path, row.place, reason)
            lacked.add(column)
            first = first or row
            continue
        used = True
        yield value
    if not used and first is not None and len(lacked) == 1 and (column := lacked.pop()) is not None:
        raise no_such_column(first, column, columns)


def no_such_column(row: Row, column: str | int, columns: str) -> UserError:
    """The error of a file in which no row has a column; `row` is the first, `columns` ends the sentence."""
    hint = other_format(row.names or row.cells)
    return UserError(f"no row of {row.path} has a column {column!r} (found: {row.found}): {hint or columns}")


def other_format(cells: Sequence[Any]) -> str | None:
    """What a file seems to be whose line has a single cell; None where that says nothing."""
    if len(cells) != 1 or not isinstance(cells[0], str):
        return None
    if cells[0].lstrip()[:1] in ("{", "["):
        return "it seems to hold JSON: name it .jsonl, or set data.format: jsonl, for a task that reads JSON lines"
    for separator, names in (("\t", "tabs"), (";", "semicolons"), (",", "commas")):
        if separator in cells[0]:
            read = "commas" if separator == "\t" else "tabs" if separator == "," else "tabs or commas"
            kind = {"\t": "tsv", ",": "csv"}.get(separator)
            advice = f"convert it, or set data.format: {kind}, for a task that has it" if kind else "convert it"
            return f"{names} seem to separate its columns, where {read} were expected: {advice}"
    return None


def structured(value: Any, what: str) -> Any:
    """A list or an object: as JSON has it, or from a cell that holds JSON, or a list or dict as Python prints it.

    Args:
        value: any value of a row; what does not look like a list or an object comes back as it is.
        what: what holds it, for messages.

    Raises:
        RowError: a cell that looks like one is neither, such as an array that NumPy printed.
    """
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    text = value.strip()
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        found = None
    # Python joins neighboring texts, so that NumPy's ['a' 'b'] would be read as one.
    if repr(found) != text:
        raise RowError(
            f"{what} holds {as_json(text)}, which is neither JSON nor a Python list: write JSON lines instead"
        )
    return found


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


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        RowError: it is not UTF-8, JSON or an object, or holds half of a surrogate pair.
    """
    check_text(text)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"it is not JSON ({error}): expected one object per line") from None
    return checked_object(values)


def checked_object(values: Any) -> dict[str, Any]:
    """A JSON value that is an object of valid text.

    Raises:
        RowError: it is not an object, or holds half of a surrogate pair.
    """
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RowError("it holds half of a surrogate pair, which is not valid text") from None
    if not isinstance(values, dict):
        raise RowError(f"it is a JSON {type(values).__name__}, expected an object")
    return values
