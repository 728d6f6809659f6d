# SPDX-License-Identifier: Apache-2.0
"""The tasks of GLUE, from their official files to their official submissions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_bert.tasks.glue_files import COLA_COLUMNS, LAYOUTS, official_files, read_glue
from megatron_bert.tasks.rows import Row, RowError, converted, other_format
from megatron_bert.tasks.sequence import SequenceTask, TextExample, class_number, number_of
from megatron_bert.tasks.settings import Column
from megatron_bert.tasks.task import Prediction
from parallel.errors import UserError
from parallel.whole_files import write_text

HIGHEST_SIMILARITY = 5.0
"""STS-B scores lie between 0 and this."""


class GlueTask(SequenceTask):
    """A task of GLUE: from `data.directory` (its own, or that of all of GLUE), or from files with the same columns."""

    @property
    def layout(self) -> Any:
        """Columns, labels and metrics of the task; see `GlueLayout`."""
        return LAYOUTS[self.settings.name]

    @property
    def problem(self) -> Any:
        """Which loss the head has."""
        return "single_label_classification" if self.layout.labels else "regression"

    @property
    def takes_pairs(self) -> bool:
        """Whether GLUE's task is on pairs of sentences."""
        return self.layout.text_pair is not None

    def find_labels(self) -> tuple[str, ...]:
        """GLUE's labels."""
        return self.layout.labels

    def default_metrics(self) -> tuple[str, ...]:
        """GLUE's metrics."""
        return self.layout.metrics

    def files(self) -> dict[str, list[Path]]:
        """The official files, or those given.

        Raises:
            UserError: the directory holds none of them.
        """
        if self.data.directory is None:
            return super().files()
        found = official_files(self.settings.name, self.data.directory)
        if not found:
            raise UserError(
                f"{self.data.directory} holds no file of {self.layout.folder}, such as train.tsv: give the directory "
                "of the task or of all of GLUE"
            )
        return found

    def read(self, path: Path, split: str, numbers: Iterator[int]) -> list[TextExample]:
        """The examples of one file."""
        rows = read_glue(self.settings.name, path, split, self.bad_rows, numbers)
        columns = f"give a file with the columns of GLUE's {self.layout.folder}, or take task.name: classification"
        return list(converted(rows, lambda row: self._example(row, split), self.bad_rows, columns=columns))

    def _example(self, row: Row, split: str) -> TextExample:
        layout = self.layout
        text: Column = layout.text
        label: Column = layout.label
        if row.names is not None and isinstance(text, int):
            text, label = "sentence", "label"  # CoLA's test file has names
        elif row.names is None and len(row.cells) != COLA_COLUMNS:
            hint = other_format(row.cells)
            raise RowError(f"it has {len(row.cells)} columns, expected {COLA_COLUMNS}{f'; {hint}' if hint else ''}")
        number = row.text(layout.number) if row.has(layout.number) else str(row.number)
        pair = None if layout.text_pair is None else row.text(layout.text_pair)
        target: tuple[float, ...] = ()
        if not (split.startswith("test") and self._unknown(row.text(label) if row.has(label) else "")):
            cell = row.text(label)
            target = (class_number(self.labels, cell) if self.labels else number_of(cell),)
        return TextExample(number, row.where, split, row.text(text), pair, target)

    @staticmethod
    def _unknown(cell: str) -> bool:
        """Whether the label of a test row stands for none: nothing, or -1, which no task of GLUE has."""
        return cell.strip() in ("", "-1", "-1.0")

    def write_submission(
        self, examples: Sequence[TextExample], predictions: Sequence[Prediction], directory: Path
    ) -> list[Path]:
        """Write the leaderboard's file of each test split: `index`, `prediction`, in the order of the test file."""
        directory.mkdir(parents=True, exist_ok=True)
        written = []
        for split, name in self.layout.submission.items():
            # MNLI has several test files, which may also be given one by one.
            files = [f"{path} line " for path in self.data.files("test") if path.stem == split]
            rows = [
                (e.id, p)
                for e, p in zip(examples, predictions, strict=True)
                if e.split == split or (e.split == "test" and e.where.startswith(tuple(files)))
            ]
            if not rows:
                continue
            lines = ["index\tprediction", *(f"{number}\t{self._submitted(p)}" for number, p in rows)]
            write_text(directory / name, "\n".join(lines) + "\n")
            written.append(directory / name)
        return written

    def _submitted(self, prediction: Prediction) -> str:
        if self.labels:
            return prediction["label"]
        return f"{min(max(prediction['value'], 0.0), HIGHEST_SIMILARITY):.3f}"
