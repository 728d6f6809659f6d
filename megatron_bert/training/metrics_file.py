# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl: one JSON object per line, read whatever has happened to it, and written when the disk lets it be."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bert.training.appended_file import AppendedFile
from parallel.whole_files import write_text

METRICS_FILE = "metrics.jsonl"
#: Rows that wait for a disk that refuses them; beyond that the oldest are lost.
MOST_WAITING = 100_000


class Rows(NamedTuple):
    """What a metrics.jsonl holds.

    Attributes:
        rows: objects with a whole number as their ``step``.
        broken: how many other lines there are, but for a last one that was cut off.
    """

    rows: list[dict[str, Any]]
    broken: int


def read_rows(path: Path) -> Rows:
    """The rows of a file, and how many lines are none; both are empty where there is no file."""
    try:
        *lines, last = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return Rows([], 0)
    found = [_row(line) for line in lines if line.strip()]
    rows = [row for row in (*found, _row(last)) if row is not None]
    return Rows(rows, found.count(None))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without lines that cannot be read; [] where there is no file."""
    return read_rows(path).rows


def rows_with(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """The rows in which all of these are numbers."""
    return [row for row in rows if all(isinstance(row.get(name), int | float) for name in names)]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    valid = isinstance(row, dict) and isinstance(row.get("step"), int) and not isinstance(row["step"], bool)
    return row if valid else None


def _line(row: dict[str, Any]) -> str:
    """JSON has no NaN and no infinity: a float16 step that was skipped has no gradient norm."""
    finite = {name: value for name, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
    return json.dumps(finite, allow_nan=False) + "\n"


class MetricsFile:
    """The file of a run that begins or goes on; the rows that will come again are dropped from it.

    Args:
        start: steps done before.

    Attributes:
        broken: lines that could not be read, and are dropped as well.
        lost: rows that could not be written, and are gone.

    Raises:
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path, self.lost = path, 0
        rows, self.broken = read_rows(path)
        kept = "".join(_line(row) for row in rows if row["step"] <= start)
        if path.exists() and kept != path.read_bytes().decode("utf-8", errors="replace"):
            write_text(path, kept)
        self._waiting: deque[bytes] = deque()
        self._file = AppendedFile(path)

    def add(self, row: dict[str, Any]) -> None:
        """A row, to be written with the next :meth:`flush`."""
        self._waiting.append(_line(row).encode())
        if len(self._waiting) > MOST_WAITING:
            self._waiting.popleft()
            self.lost += 1

    def flush(self) -> bool:
        """Write the rows that wait; whether the file was removed, and a new one was begun.

        Raises:
            OSError: the file system refuses, and the rows wait on.
        """
        began = not self._file.in_place
        if began:
            self._reopen()
        while self._waiting:
            self._file.add(self._waiting[0])
            self._waiting.popleft()
        return began

    def forget_after(self, step: int) -> None:
        """Drop the rows after a step, which will come again.

        Raises:
            OSError: the file system refuses; the rows are there still.
        """
        self.flush()
        rows = read_rows(self.path).rows
        write_text(self.path, "".join(_line(row) for row in rows if row["step"] <= step))
        self._reopen()

    def _reopen(self) -> None:
        file = AppendedFile(self.path)
        self._file.close()
        self._file = file

    def close(self) -> None:
        """Close the file; rows that wait still are lost."""
        self._file.close()

    @property
    def waiting(self) -> int:
        """Rows that could not be written yet."""
        return len(self._waiting)
