# SPDX-License-Identifier: Apache-2.0
"""Classification and regression of a text or a pair of texts."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.tasks import metrics
from megatron_bert.tasks.class_weights import given_weights
from megatron_bert.tasks.encoding import BERT, InputFormat, pooled_feature
from megatron_bert.tasks.rows import RowError
from megatron_bert.tasks.settings import TaskDataSettings, TaskSettings
from megatron_bert.tasks.stream import name_of, text_of
from megatron_bert.tasks.task import IGNORED, Example, Head, Instance, Prediction, Task
from parallel.errors import UserError, first_of


@dataclass(frozen=True)
class TextExample(Example):
    """A text or a pair of texts.

    Attributes:
        text: the text, or the first of a pair.
        text_pair: the second of a pair.
        target: () without a label; (class number,), (number,), or a 0 or 1 for every label of a multi-label task.
    """

    text: str
    text_pair: str | None
    target: tuple[float, ...] = ()

    @property
    def labeled(self) -> bool:
        """Whether its label is known."""
        return bool(self.target)


class SequenceTask(Task[TextExample, Instance]):
    """Classification or regression on the pooled first token.

    Rows of a stream have `text`, and `text_pair` for a pair; `id` where they have a name. Predictions have `label` (or
    `labels` of a multi-label task) and `probabilities` by label, or the `value` of a regression.
    """

    def __init__(
        self, settings: TaskSettings, data: TaskDataSettings, tokenizer: Tokenizer, form: InputFormat = BERT
    ) -> None:
        super().__init__(settings, data, tokenizer, form)
        self.labels = self.find_labels()
        fewest = {"single_label_classification": 2, "multi_label_classification": 1, "regression": 0}[self.problem]
        if len(self.labels) < fewest:
            raise UserError(f"the task needs {fewest} labels or more, not {list(self.labels)}: set task.labels")
        self.head = Head("sequence", max(1, len(self.labels)), self.problem)
        given_weights(settings.class_weights, self.labels)
        self.choose_metric(self.default_metrics())

    @property
    @abstractmethod
    def problem(self) -> Any:
        """Which loss the head has; see `Head`."""

    @property
    @abstractmethod
    def takes_pairs(self) -> bool:
        """Whether an example is a pair of texts."""

    @abstractmethod
    def find_labels(self) -> tuple[str, ...]:
        """Names by class number; () for regression."""

    def default_metrics(self) -> tuple[str, ...]:
        """Names of the metrics, the one that decides first."""
        if self.problem == "regression":
            return ("pearson_spearman", "pearson", "spearman", "squared_error_loss")
        if self.problem == "multi_label_classification":
            return ("f1_micro", "f1_macro", "accuracy")
        return ("accuracy", "f1_macro", "matthews")

    def example_from(self, row: Mapping[str, Any], where: str) -> TextExample:
        """An example from `text` and, for a pair, `text_pair`."""
        given = row.get("text_pair") is not None
        if given and not self.takes_pairs and not self.any_pairs:
            raise UserError(f'{where} has "text_pair", but the task is on single texts: leave it out')
        expected = given if self.any_pairs else self.takes_pairs
        pair = text_of(row, "text_pair", where) if expected else None
        return TextExample(name_of(row, where), where, "predict", text_of(row, "text", where), pair)

    def instances(self, examples: Sequence[TextExample], *, train: bool) -> list[Instance]:
        """One instance per example."""
        firsts = self.tokenizer.encode_batch([example.text for example in examples])
        seconds = iter(self.tokenizer.encode_batch([e.text_pair for e in examples if e.text_pair is not None]))
        instances = []
        for place, (example, first) in enumerate(zip(examples, firsts, strict=True)):
            assert example.target or not train, f"{example.where} has no label to train on"
            second = None if example.text_pair is None else next(seconds)
            feature = pooled_feature(self.tokenizer, self.form, first, second, self.max_length)
            instances.append(Instance((feature,), self._label(example), place))
        return instances

    def _label(self, example: TextExample) -> np.ndarray:
        if self.problem == "single_label_classification":
            return np.array(example.target or (IGNORED,), dtype=np.int64)
        return np.array(example.target or (math.nan,) * self.head.outputs, dtype=np.float32)

    def predictions(
        self, examples: Sequence[TextExample], instances: Sequence[Instance], logits: Sequence[np.ndarray]
    ) -> list[Prediction]:
        """Label and probabilities, or the value, of each example."""
        return [
            {"id": examples[instance.example].id, **self._prediction(scores)}
            for instance, scores in zip(instances, logits, strict=True)
        ]

    def shown(self, example: TextExample) -> dict[str, Any]:
        """`text`, `text_pair`, and `gold_label`, `gold_labels` or `gold_value`."""
        texts = {"text": example.text} | ({} if example.text_pair is None else {"text_pair": example.text_pair})
        if not example.target:
            return texts
        if self.problem == "regression":
            return texts | {"gold_value": example.target[0]}
        if self.problem == "single_label_classification":
            return texts | {"gold_label": self.labels[int(example.target[0])]}
        given = [label for label, value in zip(self.labels, example.target, strict=True) if value]
        return texts | {"gold_labels": given}

    def _prediction(self, scores: np.ndarray) -> Prediction:
        if self.problem == "regression":
            return {"value": float(scores[0])}
        if self.problem == "single_label_classification":
            chances = metrics.softmax(scores)
            by_label = dict(zip(self.labels, chances.tolist(), strict=True))
            return {"label": self.labels[int(chances.argmax())], "probabilities": by_label}
        by_label = dict(zip(self.labels, metrics.sigmoid(scores).tolist(), strict=True))
        given = [label for label, chance in by_label.items() if chance >= self.settings.label_threshold]
        return {"labels": given, "probabilities": by_label}

    def metrics(self, examples: Sequence[TextExample], predictions: Sequence[Prediction]) -> dict[str, float]:
        """The task's metrics over the labeled examples."""
        pairs = [(e.target, p) for e, p in zip(examples, predictions, strict=True) if e.target]
        if not pairs:
            return {}
        if self.problem == "regression":
            found = metrics.regression_metrics([target[0] for target, _ in pairs], [p["value"] for _, p in pairs])
        elif self.problem == "multi_label_classification":
            predicted = [[int(label in p["labels"]) for label in self.labels] for _, p in pairs]
            found = metrics.multi_label_metrics(np.array([t for t, _ in pairs], dtype=np.int64), np.array(predicted))
        else:
            true, classes = self._classes(pairs)
            found = {name: self._class_metric(name, true, classes) for name in self.metrics_names}
        return {name: found[name] for name in self.metrics_names}

    def _classes(self, pairs: Sequence[tuple[tuple[float, ...], Prediction]]) -> tuple[list[int], list[int]]:
        return [int(target[0]) for target, _ in pairs], [self.labels.index(p["label"]) for _, p in pairs]

    @staticmethod
    def _class_metric(name: str, true: list[int], predicted: list[int]) -> float:
        if name == "accuracy_f1":
            return (metrics.accuracy(true, predicted) + metrics.binary_f1(true, predicted)) / 2
        measures = {
            "accuracy": metrics.accuracy,
            "f1": metrics.binary_f1,
            "f1_macro": metrics.macro_f1,
            "matthews": metrics.matthews,
        }
        return measures[name](true, predicted)

    def confusion(
        self, examples: Sequence[TextExample], predictions: Sequence[Prediction]
    ) -> tuple[tuple[str, ...], np.ndarray] | None:
        """Counts of true and predicted labels, for tasks with one label a text."""
        pairs = [(e.target, p) for e, p in zip(examples, predictions, strict=True) if e.target]
        if self.problem != "single_label_classification" or not pairs:
            return None
        return self.labels, metrics.confusion_matrix(*self._classes(pairs), classes=len(self.labels))


def class_number(labels: Sequence[str], label: str) -> float:
    """The number of a label.

    Raises:
        RowError: there is no such label.
    """
    if label not in labels:
        near = [name for name in labels if name.lower() == label.lower()]
        hint = f'; "{near[0]}" differs in its case, which counts: quote the names in task.labels' if near else ""
        raise RowError(f'its label "{label[:40]}" is unknown (known: {first_of(labels, 12)}){hint}')
    return float(labels.index(label))


def number_of(value: Any) -> float:
    """A finite number from a cell.

    Raises:
        RowError: it is none.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"its label {value!r} is not a finite number")
    return number
