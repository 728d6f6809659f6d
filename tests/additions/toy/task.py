# SPDX-License-Identifier: Apache-2.0
"""A task: which word of a text is meant."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.tasks.encoding import BERT, InputFormat, feature
from megatron_bert.tasks.settings import TaskDataSettings, TaskSettings
from megatron_bert.tasks.stream import name_of, text_of
from megatron_bert.tasks.task import IGNORED, Example, Head, Instance, Prediction, Task


@dataclass(frozen=True)
class PointerExample(Example):
    """A text, and the number of the word, -100 where it is not known."""

    text: str
    place: int = IGNORED

    @property
    def labeled(self) -> bool:
        """Whether the word is known."""
        return self.place != IGNORED


class PointerTask(Task[PointerExample, Instance]):
    """Rows have `text` and `place`."""

    def __init__(
        self, settings: TaskSettings, data: TaskDataSettings, tokenizer: Tokenizer, form: InputFormat = BERT
    ) -> None:
        super().__init__(settings, data, tokenizer, form)
        self.head = Head("pointer", 1)
        self.choose_metric(("accuracy",))

    def read(self, path: Path, split: str, numbers: Iterator[int]) -> list[PointerExample]:
        """One JSON object a line."""
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [PointerExample(next(numbers), f"{path}", split, row["text"], row["place"]) for row in rows]

    def example_from(self, row: Mapping[str, Any], where: str) -> PointerExample:
        """From `text`."""
        return PointerExample(name_of(row, where), where, "predict", text_of(row, "text", where))

    def instances(self, examples: Sequence[PointerExample], *, train: bool) -> list[Instance]:
        """A row for each token of a text."""
        del train
        found = []
        for number, tokens in enumerate(self.tokenizer.encode_batch([example.text for example in examples])):
            tokens = tokens[: self.max_length - 2]
            sequence = feature(self.tokenizer, self.form, tokens, None, rows=range(1, 1 + len(tokens)))
            found.append(Instance((sequence,), np.array([examples[number].place]), number))
        return found

    def predictions(
        self, examples: Sequence[PointerExample], instances: Sequence[Instance], logits: Sequence[np.ndarray]
    ) -> list[Prediction]:
        """The word with the highest score."""
        del instances
        return [{"id": e.id, "place": int(scores.argmax())} for e, scores in zip(examples, logits, strict=True)]

    def shown(self, example: PointerExample) -> dict[str, Any]:
        """The text and the right word."""
        return {"text": example.text, "gold_place": example.place}

    def metrics(self, examples: Sequence[PointerExample], predictions: Sequence[Prediction]) -> dict[str, float]:
        """How many words are right."""
        right = [e.place == p["place"] for e, p in zip(examples, predictions, strict=True) if e.labeled]
        return {"accuracy": sum(right) / len(right)} if right else {}
