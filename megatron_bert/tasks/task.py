# SPDX-License-Identifier: Apache-2.0
"""What a fine-tuning task is: how rows become sequences and labels, and how logits become predictions and metrics.

This room works on numpy arrays alone. The training side turns an `Instance` into a micro batch, runs the encoder with
the `Head` the task asks for and hands the logits back.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar

import numpy as np

from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.tasks.class_weights import balanced_weights, given_weights
from megatron_bert.tasks.encoding import BERT, Feature, InputFormat
from megatron_bert.tasks.rows import BadRows, file_fingerprint
from megatron_bert.tasks.settings import TaskDataSettings, TaskSettings
from megatron_bert.tasks.splits import assign_parts, held_out_splits
from megatron_bert.tasks.table import TASKS
from parallel.errors import UserError

IGNORED = -100
"""Class number of what has no label and enters neither the loss nor a metric."""

UNKNOWN_CLASS = (-1, "-1")
"""What stands for an unknown class in test files, as those of GLUE and SWAG on the Hugging Face hub have it."""

Prediction = dict[str, Any]
"""What a task says of one example: JSON-able."""


@dataclass(frozen=True)
class Instance:
    """What one loss term is made of.

    Attributes:
        features: the choices of a multiple-choice question; one sequence for every other head.
        label: by head: sequence int64 [1] (single label), float32 [outputs] of 0 and 1 (multi label), float32 [1]
            (regression); choice int64 [1]; token int64 [R]; span int64 [2], start and end as indices into `rows`, which
            are positions ((0, 0): no answer in this window). What is not labeled is `IGNORED`, or nan where floating.
        example: index into the list of examples it was made from.
    """

    features: tuple[Feature, ...]
    label: np.ndarray
    example: int


@dataclass(frozen=True)
class Head:
    """The head a task needs on the encoder.

    Attributes:
        kind: in the table of kinds of heads: sequence (on the pooled first token), choice (one score a sequence,
            softmax over the choices), token, span (a start and an end score for every position) and others.
        outputs: width of its logits: the number of labels; 1 for choice and regression; 2 for span.
        problem: which loss a sequence head has; None for the others.
    """

    kind: str
    outputs: int
    problem: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None


@dataclass(frozen=True)
class Example:
    """One row as read.

    Attributes:
        id: what names it in predictions; of rows of a stream also a whole number.
        where: file and line, or question id, for messages.
        split: the split it was read from; "predict" for rows of a stream.
    """

    id: str | int
    where: str
    split: str

    @property
    def labeled(self) -> bool:
        """Whether its label is known."""
        raise NotImplementedError


ExampleT = TypeVar("ExampleT", bound=Example)
InstanceT = TypeVar("InstanceT", bound=Instance)


class Task(ABC, Generic[ExampleT, InstanceT]):
    """A fine-tuning task.

    Attributes:
        form: how the encoder's inputs are laid out.
        head: the head it needs.
        labels: names by class number; () for regression, spans and choices.
        max_length: longest sequence it makes, in tokens, special tokens included.
        metric: the one that decides which checkpoint is best.
        metrics_names: all it reports. Greater is better, except for names that end in "loss".
        any_pairs: whether a row of a stream may have a pair of texts or not, where nothing says what the model was
            trained on.
        bad_rows: what was wrong in the files read so far, and how many rows were skipped.
    """

    head: Head
    labels: tuple[str, ...] = ()
    max_length: int
    metric: str
    metrics_names: tuple[str, ...]
    any_pairs: bool = False

    def __init__(
        self, settings: TaskSettings, data: TaskDataSettings, tokenizer: Tokenizer, form: InputFormat = BERT
    ) -> None:
        self.settings, self.data, self.tokenizer, self.form = settings, data, tokenizer, form
        self.max_length = settings.max_length or TASKS[settings.name].max_length
        self.bad_rows = BadRows(data.on_bad_row)
        self._read: dict[str, list[ExampleT]] = {}
        self._rows_used: dict[tuple[str, Path], int] = {}

    def choose_metric(self, names: tuple[str, ...], default: str | None = None) -> None:
        """Set `metrics_names`, and as `metric` the settings' choice, or else the default or the first of them."""
        self.metrics_names = names
        self.metric = self.settings.metric or default or names[0]
        if self.metric not in names or self.metric.endswith("loss"):
            choices = ", ".join(name for name in names if not name.endswith("loss"))
            raise UserError(f'task.metric "{self.metric}" cannot decide: the task "{self.settings.name}" has {choices}')

    def longest_query(self, usual: int, rest: str) -> int:
        """Tokens of the longest question, of which so many are usual, in sequences that hold the rest as well."""
        room = self.max_length - self.form.pair_specials
        longest = self.settings.max_query_length or min(usual, room // 2)
        if longest >= room:
            raise UserError(
                f"task.max_query_length {longest} leaves no room for {rest} in sequences of {self.max_length}: make it "
                "smaller, or task.max_length larger"
            )
        return longest

    def files(self) -> dict[str, list[Path]]:
        """The data files of each split, as the settings give them."""
        given = {split: self.data.files(split) for split in ("train", "valid", "test")}
        return {split: paths for split, paths in given.items() if paths}

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits there are: of files, and held out of the training file."""
        files = self.files()
        held_out = held_out_splits(self.data) if "train" in files else ()
        for part in held_out:
            if any(split.startswith(part) for split in files):
                raise UserError(f"there are files for {part} in {self.data.directory}: leave out data.{part}_fraction")
        return (*files, *held_out)

    @property
    def valid_splits(self) -> tuple[str, ...]:
        """Splits to validate on, the one whose metric decides first; () without validation data."""
        return tuple(split for split in self.splits if split.startswith("valid"))

    @property
    def test_splits(self) -> tuple[str, ...]:
        """Splits to test on, which may have no labels; () without."""
        return tuple(split for split in self.splits if split.startswith("test"))

    def examples(self, split: str) -> list[ExampleT]:
        """The examples of a split, in file order; files are read once.

        Raises:
            UserError: no such split or file, no usable row in it, or a bad row with `on_bad_row: error`.
        """
        if split not in self.splits:
            given = ", ".join(self.splits) or "none"
            raise UserError(f'there is no data for "{split}" (there is: {given}): set data.{split.split("_")[0]}')
        if split in self._read:
            return self._read[split]
        files = self.files()
        source = split if split in files else "train"
        found: list[ExampleT] = []
        numbers = itertools.count()
        for path in files[source]:
            examples = self.read(path, source, numbers)
            self._rows_used[source, path] = len(examples)
            found += examples
        if not found:
            paths = ", ".join(str(path) for path in files[source])
            reasons = (text for text in self.bad_rows.reasons if text.startswith(tuple(map(str, files[source]))))
            because = f" (the first reason: {reason})" if (reason := next(reasons, None)) else ""
            raise UserError(f"{paths} holds no usable row{because}: give a file in the format of the task")
        if source == "train":
            self.check_training_data(found)
            groups = [self.group(example) for example in found]
            for part, places in assign_parts(groups, self.data).items():
                self._read[part] = [replace(found[place], split=part) for place in places]
        else:
            self._read[split] = found
        return self._read[split]

    def data_fingerprints(self) -> dict[str, list[dict[str, Any]]]:
        """For each split of files: path, sha256, bytes, and examples and rows skipped where it was read by now."""
        return {
            split: [
                {
                    **file_fingerprint(path),
                    "examples": self._rows_used.get((split, path)),
                    "skipped": self.bad_rows.skipped.get(str(path), 0),
                }
                for path in paths
            ]
            for split, paths in self.files().items()
        }

    @abstractmethod
    def read(self, path: Path, split: str, numbers: Iterator[int]) -> list[ExampleT]:
        """The examples of one file; bad rows go to `bad_rows`.

        Args:
            split: what it is read for; test splits may lack labels.
            numbers: gives each row its number, which goes on from file to file of a split.
        """

    def check_training_data(self, examples: Sequence[ExampleT]) -> None:
        """Refuse settings that do nothing with the training data (UserError)."""

    def group(self, example: ExampleT) -> str:
        """What keeps examples in one part when the training file is divided."""
        return str(example.id)

    @abstractmethod
    def example_from(self, row: Mapping[str, Any], where: str) -> ExampleT:
        """An example from one JSON object of a stream; see the class for its keys. Labels are not read.

        Raises:
            UserError: a key is missing or holds something else; names `where`.
        """

    @abstractmethod
    def instances(self, examples: Sequence[ExampleT], *, train: bool) -> list[InstanceT]:
        """Tokenize examples; every one gives at least one instance, and instances are in the order of examples.

        Args:
            train: for training, where every example must be labeled.
        """

    @abstractmethod
    def predictions(
        self, examples: Sequence[ExampleT], instances: Sequence[InstanceT], logits: Sequence[np.ndarray]
    ) -> list[Prediction]:
        """What the model says of each example.

        Args:
            examples: as given to `instances`.
            instances: as returned by `instances(examples, train=False)`.
            logits: float32, for instances[i]: sequence [outputs], choice [choices], token [R, outputs], span [R, 2].
        """

    def class_weights(self, instances: Sequence[InstanceT]) -> np.ndarray | None:
        """How much each class counts in the loss of these instances, float32 [labels]; None where all count alike."""
        if self.settings.class_weights == "balanced":
            return balanced_weights([instance.label for instance in instances], len(self.labels))
        return given_weights(self.settings.class_weights, self.labels)

    @abstractmethod
    def shown(self, example: ExampleT) -> dict[str, Any]:
        """What stands beside the prediction of an example in a file.

        Its texts, as in a row of a stream, and the right answer, where it is known, under the prediction's key with
        `gold_` before it.
        """

    @abstractmethod
    def metrics(self, examples: Sequence[ExampleT], predictions: Sequence[Prediction]) -> dict[str, float]:
        """`metrics_names` and their values over the labeled examples; {} where none is labeled."""

    def confusion(
        self,
        examples: Sequence[ExampleT],  # noqa: ARG002
        predictions: Sequence[Prediction],  # noqa: ARG002
    ) -> tuple[tuple[str, ...], np.ndarray] | None:
        """Label names and an int64 matrix [labels, labels], rows true and columns predicted; None without classes."""
        return None

    def write_submission(
        self,
        examples: Sequence[ExampleT],  # noqa: ARG002
        predictions: Sequence[Prediction],  # noqa: ARG002
        directory: Path,  # noqa: ARG002
    ) -> list[Path]:
        """Write predictions in the task's official format; returns the files, [] where there is no such format."""
        return []

    def calibrated(
        self,
        examples: Sequence[ExampleT],  # noqa: ARG002
        predictions: Sequence[Prediction],  # noqa: ARG002
    ) -> Self:
        """The task with what is to be chosen on validation data (a threshold) chosen; itself where there is nothing."""
        return self

    def describe(self) -> dict[str, Any]:
        """What `registry.restore_task` needs to rebuild the task beside a saved model, JSON-able."""
        return {"settings": self.settings.model_copy(update=self._found()).model_dump(mode="json")}

    def _found(self) -> dict[str, Any]:
        """Settings that were found in the data rather than given."""
        return {"max_length": self.max_length}
