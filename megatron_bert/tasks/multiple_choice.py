# SPDX-License-Identifier: Apache-2.0
"""Multiple choice: RACE, SWAG, ARC and a user's own questions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bert.data.tokenizers import SpannedTokens, Tokenizer
from megatron_bert.tasks import metrics
from megatron_bert.tasks.choice_files import ChoiceExample, choice_format, official_choice_files, read_choices
from megatron_bert.tasks.choice_rows import FEWEST_CHOICES
from megatron_bert.tasks.encoding import BERT, Feature, InputFormat, feature, pooled_feature
from megatron_bert.tasks.settings import ColumnSettings, TaskDataSettings, TaskSettings
from megatron_bert.tasks.stream import name_of, text_of, texts_of
from megatron_bert.tasks.task import IGNORED, Head, Instance, Prediction, Task
from parallel.errors import UserError

MAX_QUERY_LENGTH = 128
BLANK = re.compile("_+")


class MultipleChoiceTask(Task[ChoiceExample, Instance]):
    """One score for each choice, softmax over the choices of a question, whose number may differ.

    With a passage a sequence is [CLS] question with choice [SEP] passage [SEP], as Megatron does for RACE: the choice
    takes the place of the blank "_" in the question, or follows it. Without, it is [CLS] question [SEP] choice [SEP].

    Rows of a stream have `question`, `choices`, and `context` where there is a passage. Predictions have `label`, the
    index of the choice, its text as `choice`, and `probabilities` in the order of the choices. Where the data have
    parts, as RACE has middle and high, there is an `accuracy_PART` for each beside `accuracy`.
    """

    def __init__(
        self, settings: TaskSettings, data: TaskDataSettings, tokenizer: Tokenizer, form: InputFormat = BERT
    ) -> None:
        super().__init__(settings, data, tokenizer, form)
        if isinstance(data.columns.label, list):
            raise UserError("data.columns.label is a list, but a question has one right choice: name one column")
        self.head = Head("choice", 1)
        self.choose_metric(("accuracy",))
        self.max_query_length = self.longest_query(MAX_QUERY_LENGTH, "the passage")

    def files(self) -> dict[str, list[Path]]:
        """The files of the directory, or those given."""
        return official_choice_files(self.data.directory) if self.data.directory is not None else super().files()

    def read(self, path: Path, split: str, numbers: Iterator[int]) -> list[ChoiceExample]:
        """The questions of one file or directory."""
        return list(read_choices(path, split, self.data, self.bad_rows, numbers))

    def check_training_data(self, examples: Sequence[ChoiceExample]) -> None:
        """Names of columns are for rows, and the length of a question and choice for those with a passage."""
        paths = self.files()["train"]
        kinds = {choice_format(path, self.data): path for path in paths}
        if self.data.columns != ColumnSettings() and not kinds.keys() & {"jsonl", "csv", "tsv"}:
            kind, path = next(iter(kinds.items()))
            raise UserError(f"data.columns means nothing to the format {kind} of {path}: leave it out")
        if self.settings.max_query_length is not None and all(example.context is None for example in examples):
            raise UserError(
                f"task.max_query_length is {self.settings.max_query_length}, but no question of {paths[0]} has a "
                "passage, beside which it would be cut: leave it out"
            )

    def group(self, example: ChoiceExample) -> str:
        """Questions on one passage stay together."""
        return example.passage or str(example.id)

    def example_from(self, row: Mapping[str, Any], where: str) -> ChoiceExample:
        """An example from `question`, `choices` and, with a passage, `context`."""
        choices = texts_of(row, "choices", where)
        if len(choices) < FEWEST_CHOICES:
            raise UserError(f'{where} has {len(choices)} "choices", expected {FEWEST_CHOICES} or more')
        context = text_of(row, "context", where) if row.get("context") is not None else None
        name = name_of(row, where)
        return ChoiceExample(name, where, "predict", text_of(row, "question", where), tuple(choices), context)

    def instances(self, examples: Sequence[ChoiceExample], *, train: bool) -> list[Instance]:
        """One instance a question."""
        passages = list(dict.fromkeys(example.context for example in examples if example.context is not None))
        encoded = dict(zip(passages, self.tokenizer.encode_batch(passages), strict=True))
        instances = []
        for place, example in enumerate(examples):
            assert example.answer is not None or not train, f"{example.where} has no answer to train on"
            if example.context is None:
                features = self._without_passage(example)
            else:
                features = self._with_passage(example, encoded[example.context])
            label = IGNORED if example.answer is None else example.answer
            instances.append(Instance(features, np.array([label], dtype=np.int64), place))
        return instances

    def _without_passage(self, example: ChoiceExample) -> tuple[Feature, ...]:
        question, *choices = self.tokenizer.encode_batch([example.question, *example.choices])
        return tuple(pooled_feature(self.tokenizer, self.form, question, choice, self.max_length) for choice in choices)

    def _with_passage(self, example: ChoiceExample, passage: list[int]) -> tuple[Feature, ...]:
        filled = [fill(example.question, choice) for choice in example.choices]
        encoded = self.tokenizer.encode_batch_with_spans([text for text, _ in filled])
        features = []
        for (_, place), found in zip(filled, encoded, strict=True):
            query = cut_around(found, place, self.max_query_length)
            room = self.max_length - self.form.pair_specials - len(query)
            features.append(feature(self.tokenizer, self.form, query, passage[:room], rows=[0]))
        return tuple(features)

    def predictions(
        self, examples: Sequence[ChoiceExample], instances: Sequence[Instance], logits: Sequence[np.ndarray]
    ) -> list[Prediction]:
        """The choice and the probability of each."""
        predictions = []
        for instance, scores in zip(instances, logits, strict=True):
            example = examples[instance.example]
            chances = metrics.softmax(scores)
            best = int(chances.argmax())
            predictions.append(
                {
                    "id": example.id,
                    "label": best,
                    "choice": example.choices[best],
                    "probabilities": chances.tolist(),
                }
            )
        return predictions

    def shown(self, example: ChoiceExample) -> dict[str, Any]:
        """`question`, `choices`, `context`, and `gold_label`, the index of the right choice."""
        context = {} if example.context is None else {"context": example.context}
        gold = {} if example.answer is None else {"gold_label": example.answer}
        return {"question": example.question, "choices": list(example.choices)} | context | gold

    def metrics(self, examples: Sequence[ChoiceExample], predictions: Sequence[Prediction]) -> dict[str, float]:
        """Share of right choices, of all questions and of each part."""
        pairs = [(e, p["label"]) for e, p in zip(examples, predictions, strict=True) if e.answer is not None]
        found = {"accuracy": pairs}
        parts = sorted({example.part for example, _ in pairs} - {""})
        if len(parts) > 1:
            found |= {f"accuracy_{part}": [pair for pair in pairs if pair[0].part == part] for part in parts}
        return {
            name: metrics.accuracy([e.answer for e, _ in some], [label for _, label in some])  # type: ignore[misc]
            for name, some in found.items()
            if some
        }


def fill(question: str, choice: str) -> tuple[str, tuple[int, int]]:
    """Question and choice as one text, and where the choice is in it: in place of the blank, or behind."""
    blank = BLANK.search(question)
    if blank is None:
        text = f"{question} {choice}"
        return text, (len(text) - len(choice), len(text))
    text = BLANK.sub(lambda _: choice, question)
    return text, (blank.start(), blank.start() + len(choice))


def cut_around(found: SpannedTokens, place: tuple[int, int], limit: int) -> list[int]:
    """At most `limit` tokens: the first, unless some of the choice would be lost, which alone tells choices apart."""
    if len(found.ids) <= limit:
        return found.ids
    inside = [number for number, (begin, end) in enumerate(found.spans) if end > place[0] and begin < place[1]]
    first, last = (inside[0], inside[-1] + 1) if inside else (0, 0)
    begin = 0 if last <= limit else min(first, last - limit)
    return found.ids[begin : begin + limit]
