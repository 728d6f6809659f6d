# SPDX-License-Identifier: Apache-2.0
"""Settings of fine-tuning tasks: the sections `task` and `data` of a fine-tuning file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from megatron_bert.section import Section
from megatron_bert.tasks.table import TASKS, has_setting
from parallel.errors import UserError

#: How much a class counts; by name, or in the order of the labels.
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
ClassWeights = Literal["none", "balanced"] | dict[str, Weight] | list[Weight]


class TaskSettings(Section):
    """What is to be learned, and how examples become sequences."""

    name: str = Field(description=f"One of {', '.join(TASKS)}.")
    max_length: int | None = Field(
        None,
        ge=8,
        description="Longest sequence in tokens, special tokens included; when unset 128 (GLUE, classification, "
        "regression, token classification), 384 (question answering) or 512 (multiple choice).",
    )
    metric: str | None = Field(
        None, description="Metric that decides which checkpoint is best; the task's own choice when unset."
    )
    labels: list[str] | None = Field(
        None,
        min_length=1,
        description="Label names in the order of their class numbers (token classification: tags such as B-PER); when "
        "unset those of the training file: whole numbers ascending, other names in code point order.",
    )
    multi_label: bool = Field(False, description="Whether a text may have several labels, or none.")
    label_threshold: float = Field(
        0.5, gt=0, lt=1, description="Probability from which on a label of a multi-label task is given."
    )
    class_weights: ClassWeights = Field(
        "none",
        description="How much each class counts in the loss of training: none (all alike); balanced (by its rarity in "
        "the training data: labels / (classes * labels of the class)); or a weight for each label, by name or as a "
        "list in their order. The loss is divided by the sum of the weights of its labels. In a multi-label task the "
        "weight is that of texts with the label, against 1 of those without it (balanced: their ratio). Scores and the "
        "loss of evaluations stay as they are.",
    )
    doc_stride: int | None = Field(
        None,
        gt=0,
        description="Tokens by which a window moves on over a text that is too long; when unset 128 (question "
        "answering), or half of max_length (token classification).",
    )
    max_query_length: int | None = Field(
        None,
        gt=0,
        description="Longest question in tokens; longer ones are cut. When unset 64 (question answering) or 128 "
        "(multiple choice with a passage: question and choice together).",
    )
    max_answer_length: int = Field(30, gt=0, description="Longest answer in tokens.")
    n_best: int = Field(20, gt=0, description="Number of candidate answers kept for each question.")
    answer_by: Literal["probability", "expected_f1"] = Field(
        "probability",
        description="Of the n_best candidates the likeliest, or the one that shares most words with all of them, by "
        "their probabilities: more F1 and fewer exact answers where a model is unsure.",
    )
    no_answer: bool = Field(False, description="Whether a question may have no answer in its text, as in SQuAD 2.0.")
    null_threshold: float | None = Field(
        None,
        description="A question has no answer when the score of none exceeds that of the best answer by more than "
        "this; when unset 0 until the best value on the validation data is found.",
    )
    scheme: Literal["BIO", "IO", "BILOU", "IOBES", "IOB1"] = Field(
        "BIO", description="How tags mark where entities start and end; BIO is also named IOB2."
    )
    decoding: Literal["argmax", "constrained"] = Field(
        "argmax",
        description="Each word's likeliest tag, or the likeliest sequence of tags that follows the scheme (Viterbi).",
    )

    @field_validator("name")
    @classmethod
    def _known_name(cls, name: str) -> str:
        known = task_name(name)
        if known not in TASKS:
            raise ValueError(f'task name "{name}" is unknown: choose {", ".join(TASKS)}')
        return known

    @field_validator("labels", mode="before")
    @classmethod
    def _names_of_labels(cls, labels: Any) -> Any:
        return [_label_name(label) for label in labels] if isinstance(labels, list) else labels

    @field_validator("labels")
    @classmethod
    def _different_labels(cls, labels: list[str] | None) -> list[str] | None:
        if labels is not None and len(set(labels)) != len(labels):
            raise ValueError(f"labels name one class twice: {', '.join(labels)}")
        return labels

    @field_validator("class_weights", mode="before")
    @classmethod
    def _names_of_weights(cls, weights: Any) -> Any:
        if not isinstance(weights, dict | list):
            if weights not in ("none", "balanced"):
                raise ValueError(f"class_weights is {weights!r}: give none, balanced, or a weight for each label")
            return weights
        for weight in weights.values() if isinstance(weights, dict) else weights:
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                raise ValueError(f"class_weights holds {weight!r}: give a number of 0 or more for each label")
        # YAML reads the label 0 as a number.
        return {_label_name(name): w for name, w in weights.items()} if isinstance(weights, dict) else weights

    @field_validator("class_weights")
    @classmethod
    def _some_weight(cls, weights: ClassWeights) -> ClassWeights:
        if not isinstance(weights, str) and not any(weights.values() if isinstance(weights, dict) else weights):
            raise ValueError("class_weights are all 0, so nothing would be learned: give one of them more")
        return weights

    @model_validator(mode="after")
    def _used(self) -> Self:
        _refuse_unused(self, "settings", self.name, "task")
        if self.null_threshold is not None and not self.no_answer:
            raise ValueError("task.null_threshold is for questions without answer: set task.no_answer: true too")
        if not self.multi_label and self.label_threshold != type(self).model_fields["label_threshold"].default:
            raise ValueError("task.label_threshold is for multi-label tasks: set task.multi_label: true too")
        return self


def _label_name(label: Any) -> str:
    """A label as YAML has it: a text, a whole number, or a truth value, whose name is that in JSON."""
    if isinstance(label, bool):
        return "true" if label else "false"
    if isinstance(label, str | int):
        return str(label)
    raise ValueError(
        f"task.labels holds {label!r}, which YAML does not read as text: quote each label as the data have it, such as "
        'task.labels=\'["1.0", "null"]\''
    )


Column = str | int


class ColumnSettings(Section):
    """Which columns of a file hold what: names, or positions counted from 0 (negative ones from the end)."""

    id: Column | None = Field(
        None,
        description="What names a row in predictions; when unset its number from 0 (multiple choice and question "
        "answering: `id`, if there is one). In tables of one word per row: the sentence that the word is in.",
    )
    text: Column | None = Field(None, description="The text, or the first of a pair; `text` when unset.")
    text_pair: Column | None = Field(None, description="The second text of a pair.")
    label: Column | list[Column] | None = Field(
        None,
        description="The label or number; `label` when unset. A list (multi label): one column of 0 and 1 for each "
        "label, which are its names. Multiple choice: which choice is right; `label`, `answerKey` or `answer` when "
        "unset.",
    )
    question: Column | None = Field(None, description="The question; `question` when unset.")
    context: Column | None = Field(
        None, description="The text that a question is about; `context` (multiple choice: or `article`) when unset."
    )
    choices: Column | list[Column] | None = Field(
        None,
        min_length=2,
        description="The list of choices, or a column for each; `choices` or `options` when unset.",
    )
    answers: Column | None = Field(None, description="The answers with their `answer_start`; `answers` when unset.")
    token: Column | None = Field(
        None,
        description="The words. Column files: their position, 0 when unset; JSON lines: `tokens` when unset; tables: "
        "`token` or `tokens`.",
    )
    tag: Column | None = Field(
        None,
        description="The tags of the words. Column files: their position, -1, the last, when unset; JSON lines: `tags` "
        "or `ner_tags` when unset; tables: `tag`, `tags` or `ner_tags`.",
    )


Files = Path | Annotated[list[Path], Field(min_length=1)]


class TaskDataSettings(Section):
    """Where examples come from."""

    train: Files | None = Field(
        None,
        description="Training file (multiple choice: file or RACE directory), or a list of them, read in this order.",
    )
    valid: Files | None = Field(
        None, description="Validation file, on which the best checkpoint is chosen, or a list of them."
    )
    test: Files | None = Field(None, description="Test file, with or without labels, or a list of them.")
    directory: Path | None = Field(
        None, description="Directory in the official layout of a GLUE task or RACE, instead of train, valid and test."
    )
    format: Literal["tsv", "csv", "jsonl", "race", "swag", "arc", "conll"] | None = Field(
        None,
        description="Tables and JSON lines: tsv, csv or jsonl; multiple choice also: race, swag or arc; token "
        "classification also: conll. Found from the file's ending, or its content, when unset.",
    )
    columns: ColumnSettings = Field(default_factory=lambda: ColumnSettings(), description="Which column holds what.")
    header: bool = Field(True, description="Whether the first line of a tsv or csv file names its columns.")
    label_separator: str | None = Field(
        None,
        min_length=1,
        description='What separates labels in one tsv or csv cell of a multi-label task; "," when unset.',
    )
    valid_fraction: float | None = Field(
        None, gt=0, lt=1, description="Share of the training file held out for validation, where there is no such file."
    )
    test_fraction: float | None = Field(
        None, gt=0, lt=1, description="Share of the training file held out for testing, where there is no such file."
    )
    split_seed: int = Field(0, ge=0, description="Which rows are held out by valid_fraction and test_fraction.")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="Whether a malformed row stops the run, with file, line and reason, or is counted."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for part in ("valid", "test"):
            if getattr(self, f"{part}_fraction") is not None and getattr(self, part) is not None:
                raise ValueError(f"data.{part}_fraction and data.{part} both say what to take: give one of them")
        if (self.valid_fraction or 0) + (self.test_fraction or 0) >= 1:
            raise ValueError("data.valid_fraction and data.test_fraction leave nothing to train on")
        if self.directory is not None and (self.train or self.valid or self.test):
            raise ValueError("data.directory names all files: leave out data.train, data.valid and data.test")
        return self

    def files(self, split: str) -> list[Path]:
        """The files given for "train", "valid" or "test"; [] where there are none."""
        given: Path | list[Path] | None = getattr(self, split)
        return given if isinstance(given, list) else [] if given is None else [given]

    def check_used_by(self, name: str) -> None:
        """Refuse settings that a task of this name does not have (UserError)."""
        _refuse_unused(self, "data", name, "data")
        _refuse_unused(self.columns, "columns", name, "data.columns")


def task_name(given: Any) -> str:
    """The name of a task as it is in the tables, however a user spells it."""
    return str(given).lower().replace("-", "")


def meaningful(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Of the settings of a saved task, those that a task of another name has too; its metric is its own."""
    own = ("name", "metric", "class_weights")
    return {key: value for key, value in settings.items() if key not in own and has_setting(name, "settings", key)}


def meaningful_data(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The same of the section ``data``."""
    kept = {key: value for key, value in settings.items() if has_setting(name, "data", key)}
    if "columns" in kept:
        kept["columns"] = {key: value for key, value in kept["columns"].items() if has_setting(name, "columns", key)}
    return kept


def _refuse_unused(section: Section, part: str, name: str, title: str) -> None:
    for field, info in type(section).model_fields.items():
        default: Any = info.get_default(call_default_factory=True)
        if not has_setting(name, part, field) and getattr(section, field) != default:
            raise UserError(f'{title}.{field} means nothing to the task "{name}": leave it out')
