# SPDX-License-Identifier: Apache-2.0
"""Classification and regression on a user's own tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_bert.tasks.rows import BadRows, Row, RowError, as_json, converted, structured
from megatron_bert.tasks.sequence import SequenceTask, TextExample, class_number, number_of
from megatron_bert.tasks.settings import Column
from megatron_bert.tasks.tables import table_rows
from megatron_bert.tasks.task import UNKNOWN_CLASS
from parallel.errors import UserError

_FLAGS = {"0": 0.0, "0.0": 0.0, "false": 0.0, "1": 1.0, "1.0": 1.0, "true": 1.0}


class ClassificationTask(SequenceTask):
    """Rows of TSV, CSV or JSON lines files, whose columns the settings name; see `ColumnSettings`.

    Labels are those of the settings, or those of the training files: whole numbers ascending, else in code point order.
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
        if self.data.label_separator is not None and not self.settings.multi_label:
            raise UserError(
                "data.label_separator is for multi-label tasks: set task.multi_label: true, or leave it out"
            )
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
        files = self.data.files("train")
        if not files:
            raise UserError("there is no training file to find labels in: set task.labels or data.train")
        found: set[str] = set()
        bad = BadRows("skip")  # reported when they are read for training, unless nothing is left
        for path in files:
            for names in converted(table_rows(path, self.data, bad), self._names, bad, columns=COLUMNS):
                found.update(names)
        if not found and bad.reasons:
            raise UserError(f"no row of {files[0]} has a label that can be used: {bad.reasons[0]}")
        return in_order(found)

    def _found(self) -> dict[str, Any]:
        return {**super()._found(), "labels": list(self.labels) or None}

    def read(self, path: Path, split: str, numbers: Iterator[int]) -> list[TextExample]:
        """The examples of one file."""
        rows = table_rows(path, self.data, self.bad_rows, numbers)
        return list(converted(rows, lambda row: self._example(row, split), self.bad_rows, columns=COLUMNS))

    def _example(self, row: Row, split: str) -> TextExample:
        columns = self.data.columns
        name = str(row.number) if columns.id is None else str(row.value(columns.id))
        text = row.text("text" if columns.text is None else columns.text)
        pair = None if columns.text_pair is None else row.text(columns.text_pair)
        target = () if self._unlabeled(row, split) else self._target(row)
        return TextExample(name, row.where, split, text, pair, target)

    def _unlabeled(self, row: Row, split: str) -> bool:
        """Whether a test row has no label, as test files may; -1 stands for none unless it is a label."""
        nothing: tuple[Any, ...] = (None,) if self.settings.multi_label else (None, "")
        if self.problem == "single_label_classification" and "-1" not in self.labels:
            nothing += UNKNOWN_CLASS
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
            if isinstance(value, list):
                raise RowError("its label is a list, as multi-label tasks have: set task.multi_label: true")
            return [_name(value)]
        if self.data.label_separator is None:
            value = structured(value, "its label")
        if isinstance(value, list):
            names = [_name(item) for item in value]
            if len(set(names)) != len(names) or any(isinstance(item, float | bool) for item in value):
                raise RowError(
                    f"its labels {as_json(value)} look like one 0 or 1 for each label: list the names of those that it "
                    "has, or give each label a column (data.columns.label: [a, b])"
                )
            return names
        parts = _name(value, empty=True).split(self.data.label_separator or ",")
        return [part.strip() for part in parts if part.strip()]

    @staticmethod
    def _flag(row: Row, column: Column) -> float:
        value = row.value(column)
        flag = _FLAGS.get(str(value).strip().lower())
        if flag is None:
            raise RowError(f"column {column!r} holds {value!r}, expected 0 or 1")
        return flag


COLUMNS = "name its columns in data.columns (text, label)"


def _name(value: Any, *, empty: bool = False) -> str:
    """The label a cell holds: a text, a whole number (1.0 is 1), or a truth value, named as in JSON."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        hint = "; for numbers there is task.name: regression" if isinstance(value, float) else ""
        raise RowError(f"its label {as_json(value)} is neither a text nor a whole number{hint}")
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
