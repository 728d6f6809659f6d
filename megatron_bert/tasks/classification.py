"""Classification and regression on a user's own tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_bert.tasks.rows import BadRows, Row, RowError, read_table
from megatron_bert.tasks.sequence import SequenceTask, TextExample, class_number, number_of
from megatron_bert.tasks.settings import Column
from parallel.errors import UserError

FORMATS: dict[str, Literal["tsv", "csv", "jsonl"]] = {
    ".tsv": "tsv",
    ".txt": "tsv",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
}
"""File ending -> format."""


class ClassificationTask(SequenceTask):
    """Rows of TSV, CSV or JSON lines files, whose columns the settings name; see `ColumnSettings`.

    Labels are those of the settings, or those of the training file: whole numbers ascending, else in code point order.
    Several labels of a text are one cell with separators, a JSON list, or one column of 0 and 1 for each label.
    """

    @property
    def problem(self) -> Any:
        """Which loss the head has."""
        if self.settings.name == "regression":
            return "regression"
        return "multi_label_classification" if self.settings.multi_label else "single_label_classification"

    @property
    def takes_pairs(self) -> bool:
        """Whether the settings name a column of second texts."""
        return self.data.columns.text_pair is not None

    def find_labels(self) -> tuple[str, ...]:
        """The settings' labels, or those found."""
        label = self.data.columns.label
        if isinstance(label, list):
            if not self.settings.multi_label:
                raise UserError("data.columns.label is a list, as multi-label tasks have: set task.multi_label: true")
            if self.settings.labels is not None and len(self.settings.labels) != len(label):
                raise UserError(
                    f"task.labels has {len(self.settings.labels)} names, but data.columns.label has {len(label)} "
                    "columns: give a name for each"
                )
            return tuple(self.settings.labels or map(str, label))
        if self.problem == "regression" or self.settings.labels is not None:
            return tuple(self.settings.labels or ())
        if self.data.train is None:
            raise UserError("there is no training file to find labels in: set task.labels or data.train")
        found: set[str] = set()
        bad = BadRows("skip")  # reported when they are read for training, unless nothing is left
        for row in self._rows(self.data.train, bad):
            try:
                found.update(self._names(row))
            except RowError as reason:
                bad.add(row.path, f"line {row.line}", reason)
        if not found and bad.reasons:
            raise UserError(f"no row of {self.data.train} has a label that can be used: {bad.reasons[0]}")
        return in_order(found)

    def _found(self) -> dict[str, Any]:
        return {**super()._found(), "labels": list(self.labels) or None}

    def read(self, path: Path, split: str) -> list[TextExample]:
        """The examples of one file."""
        examples = []
        for row in self._rows(path, self.bad_rows):
            try:
                examples.append(self._example(row, split))
            except RowError as reason:
                self.bad_rows.add(path, f"line {row.line}", reason)
        return examples

    def _rows(self, path: Path, bad: BadRows) -> Any:
        kind: Any = self.data.format or FORMATS.get(path.suffix)
        if kind is None:
            raise UserError(f"{path} does not show its format by its ending: set data.format: tsv, csv or jsonl")
        if kind not in FORMATS.values():
            raise UserError(f"data.format {kind} is for multiple choice: set tsv, csv or jsonl")
        return read_table(path, kind, self.data.header, bad)

    def _example(self, row: Row, split: str) -> TextExample:
        columns = self.data.columns
        name = str(row.number) if columns.id is None else str(row.value(columns.id))
        text = row.text("text" if columns.text is None else columns.text)
        pair = None if columns.text_pair is None else row.text(columns.text_pair)
        target = () if self._unlabelled(row, split) else self._target(row)
        return TextExample(name, row.where, split, text, pair, target)

    def _unlabelled(self, row: Row, split: str) -> bool:
        """Whether a test row has no label, as test files may."""
        nothing = (None,) if self.settings.multi_label else (None, "")
        columns = self._label_columns()
        return split.startswith("test") and all(not row.has(c) or row.value(c) in nothing for c in columns)

    def _label_columns(self) -> list[Column]:
        label = self.data.columns.label
        return label if isinstance(label, list) else ["label" if label is None else label]

    def _target(self, row: Row) -> tuple[float, ...]:
        if self.problem == "regression":
            return (number_of(row.value(self._label_columns()[0])),)
        if isinstance(self.data.columns.label, list):
            return tuple(self._flag(row, column) for column in self._label_columns())
        names = self._names(row)
        numbers = [class_number(self.labels, name) for name in names]
        if not self.settings.multi_label:
            return tuple(numbers)
        return tuple(float(number in numbers) for number in range(len(self.labels)))

    def _names(self, row: Row) -> list[str]:
        """The labels of a row; exactly one unless the task is multi-label."""
        value = row.value(self._label_columns()[0])
        if not self.settings.multi_label:
            return [_name(value)]
        if isinstance(value, list):
            return [_name(item) for item in value]
        parts = _name(value, empty=True).split(self.data.label_separator or ",")
        return [part.strip() for part in parts if part.strip()]

    @staticmethod
    def _flag(row: Row, column: Column) -> float:
        value = row.value(column)
        if value not in (0, 1, "0", "1"):
            raise RowError(f"column {column!r} holds {value!r}, expected 0 or 1")
        return float(value)


def _name(value: Any, *, empty: bool = False) -> str:
    """The label a cell holds: a text or a whole number."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(f"its label {value!r} is neither a text nor a whole number")
    name = str(value).strip()
    if not name and not empty:
        raise RowError("its label is empty")
    return name


def in_order(labels: set[str] | Sequence[str]) -> tuple[str, ...]:
    """Labels in the order of their class numbers: whole numbers ascending, other names in code point order."""
    try:
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(labels))
