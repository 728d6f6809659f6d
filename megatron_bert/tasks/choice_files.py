# SPDX-License-Identifier: Apache-2.0
"""Files of multiple-choice questions: RACE, SWAG, ARC, JSON lines and tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_bert.tasks.choice_rows import (
    FEWEST_CHOICES,
    LETTERS,
    NO_ANSWER,
    answer_number,
    flat_choices,
    texts_of_choices,
)
from megatron_bert.tasks.rows import BadRows, Row, RowError, converted
from megatron_bert.tasks.settings import ColumnSettings, TaskDataSettings
from megatron_bert.tasks.tables import FORMATS, TableKind, first_row, read_table, table_rows
from megatron_bert.tasks.task import Example
from parallel.errors import UserError

Format = Literal["race", "swag", "arc", "jsonl", "csv", "tsv"]

DIGITS = "123456789"
NAMES_IN_LINE_1 = "if the line names columns, say in data.columns which hold question, choices and label"

DIRECTORIES: dict[Format, dict[str, str]] = {
    "race": {"train": "train", "valid": "dev", "test": "test"},
    "swag": {"train": "train.csv", "valid": "val.csv", "test": "test.csv"},
    "arc": {"train": "*-Train.jsonl", "valid": "*-Dev.jsonl", "test": "*-Test.jsonl"},
}
"""Official layout -> split -> what there is in the directory."""


@dataclass(frozen=True)
class ChoiceExample(Example):
    """A question with its choices.

    Attributes:
        question: the question, or the beginning that a choice continues.
        choices: two or more.
        context: the passage it is about; None where there is none.
        answer: index of the right choice; None where unknown.
        part: the part of the data it belongs to, such as RACE's "middle" and "high"; "" without parts.
        passage: what questions on the same passage share.
    """

    question: str
    choices: tuple[str, ...]
    context: str | None
    answer: int | None = None
    part: str = ""
    passage: str = ""

    @property
    def labeled(self) -> bool:
        """Whether its answer is known."""
        return self.answer is not None


def official_choice_files(directory: Path) -> dict[str, list[Path]]:
    """The files of RACE's, SWAG's or ARC's directory, by split.

    Raises:
        UserError: it is none of these.
    """
    for patterns in DIRECTORIES.values():
        found = {split: sorted(directory.glob(pattern)) for split, pattern in patterns.items()}
        if any(found.values()):
            return {split: paths for split, paths in found.items() if paths}
    raise UserError(
        f"{directory} is not a directory of RACE (train/, dev/, test/), SWAG (train.csv, val.csv, test.csv) or ARC "
        "(*-Train.jsonl, *-Dev.jsonl, *-Test.jsonl): give one, or data.train and data.valid"
    )


def choice_format(path: Path, data: TaskDataSettings) -> Format:
    """The format of a file or directory: as the settings say, or as its ending and content show.

    Raises:
        UserError: the format is that of another task, or the file cannot be read.
    """
    if data.format == "conll":
        raise UserError("data.format conll is for token classification: set race, swag, arc, jsonl, csv or tsv")
    if data.format is not None:
        return data.format
    if path.is_dir() or path.suffix == ".txt":
        return "race"
    kind: TableKind = FORMATS.get(path.suffix.lower(), "jsonl")
    if kind == "tsv" or data.columns != ColumnSettings():
        return kind
    values = first_row(path, kind) or {}
    if "ending0" in values:
        return "swag"
    if kind == "csv":
        return "csv" if "question" in values else "arc"
    if "article" in values and "question" not in values:
        return "race"
    return "arc" if isinstance(values.get("question"), dict) else "jsonl"


def read_choices(
    path: Path, split: str, data: TaskDataSettings, bad: BadRows, numbers: Iterator[int]
) -> Iterator[ChoiceExample]:
    """The questions of a file, or of a directory of RACE articles; bad rows go to `bad`.

    Args:
        path: file or directory.
        split: test splits may lack answers.
        data: the format, None to see it in the content, and the columns of rows.
    """
    kind = choice_format(path, data)
    listed = FORMATS.get(path.suffix.lower()) == "jsonl"
    if not data.header and (kind in ("race", "swag") or (kind == "arc" and listed)):
        raise UserError(f"data.header: false means nothing to the format {kind} of {path}: leave it out")
    if kind == "race":
        rows = _race_rows(path, bad, numbers)
    elif kind == "swag":
        rows = read_table(path, "jsonl" if listed else "csv", True, bad, numbers=numbers)
    elif kind == "arc" and not listed:
        rows = read_table(path, "csv", False, bad, equal_widths=False, numbers=numbers)
    elif kind == "arc":
        rows = read_table(path, "jsonl", True, bad, numbers=numbers)
    else:
        rows = table_rows(path, data.model_copy(update={"format": kind}), bad, numbers)

    def example(row: Row) -> ChoiceExample:
        found = _example(row, kind, split, data.columns)
        _enough(found.choices)
        if found.answer is not None and not 0 <= found.answer < len(found.choices):
            raise RowError(f"its answer is choice {found.answer}, but it has {len(found.choices)} (from 0)")
        if found.answer is None and not split.startswith("test"):
            raise RowError("it has no answer")
        return found

    columns = "name its columns in data.columns (question, choices, label, context)"
    return converted(rows, example, bad, columns=columns)


def _example(row: Row, kind: Format, split: str, columns: ColumnSettings) -> ChoiceExample:
    if isinstance(row, ArticleRow):
        return _race_question(row, split)
    if kind == "swag":
        return _swag(row, split)
    if kind == "arc" and row.names is None:
        return _arc_row(row, split)
    if kind == "arc" and not _has_text(row):
        return _arc_line(row, split)
    return _flat(row, split, columns)


def _has_text(row: Row) -> bool:
    """Whether a row's question is a text, as in the rows of ARC on the Hugging Face hub."""
    return row.has("question") and isinstance(row.value("question"), str)


def _flat(row: Row, split: str, columns: ColumnSettings) -> ChoiceExample:
    """A question per row, in the columns that the settings name, or the usual ones; see `choice_rows`."""
    found = flat_choices(row, columns, labeled=not split.startswith("test"))
    question = row.text("question" if columns.question is None else columns.question)
    name = _name(row) if columns.id is None else str(row.value(columns.id))
    return ChoiceExample(
        name, row.where, split, question, found.texts, found.context, found.answer, passage=found.context or ""
    )


def _swag(row: Row, split: str) -> ChoiceExample:
    """Columns sent1, sent2 (the beginning of the second sentence), ending0..., and label (absent in the test file)."""
    endings = [f"ending{number}" for number in range(len(row.cells)) if row.has(f"ending{number}")]
    begin = row.text("sent2")
    choices = tuple(f"{begin} {row.text(ending)}".strip() for ending in endings)
    unknown = split.startswith("test") and (not row.has("label") or row.value("label") in NO_ANSWER)
    answer = None if unknown else answer_number(row.value("label"), choices)
    return ChoiceExample(str(row.number), row.where, split, row.text("sent1"), choices, None, answer)


def _arc_row(row: Row, split: str) -> ChoiceExample:
    """Columns question, choices..., letter or number of the answer, without names; lacking choices are empty."""
    if len(row.cells) < FEWEST_CHOICES + 2:
        raise RowError(f"it has {len(row.cells)} columns, expected question, choices and answer")
    question, *choices, answer = (row.text(place) for place in range(len(row.cells)))
    while choices and not choices[-1]:
        choices.pop()
    _enough(choices)
    names = DIGITS if answer.isdecimal() else LETTERS
    unknown = split.startswith("test") and answer in NO_ANSWER
    if not unknown and row.line == 1 and answer not in names[: len(choices)]:
        raise RowError(f"its answer {answer!r} is none of {', '.join(names[: len(choices)])}; {NAMES_IN_LINE_1}")
    number = None if unknown else _letter(answer, names[: len(choices)])
    return ChoiceExample(str(row.number), row.where, split, question, tuple(choices), None, number)


def _arc_line(row: Row, split: str) -> ChoiceExample:
    """AI2's JSON lines: {"id", "question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}."""
    question = row.value("question")
    if not isinstance(question, Mapping) or not isinstance(question.get("choices"), list):
        raise RowError('its "question" is not an object with "stem" and "choices"')
    texts, names = texts_of_choices(question["choices"])
    unknown = not row.has("answerKey") or (split.startswith("test") and row.value("answerKey") in NO_ANSWER)
    answer = None if unknown else _letter(row.text("answerKey"), names or ())
    return ChoiceExample(_name(row), row.where, split, _text(question, "stem"), texts, None, answer)


@dataclass(frozen=True)
class ArticleRow(Row):
    """A row that is an article of RACE, to be read for one of its questions.

    Attributes:
        question: which of them, from 0.
        part: the part of RACE, "middle" or "high", that the folder names; "" where it names none.
    """

    question: int = 0
    part: str = ""


def _race_rows(path: Path, bad: BadRows, numbers: Iterator[int]) -> Iterator[Row]:
    """A row for each question of the articles in a *.txt file, or in all those below a directory.

    An article is a JSON object per line. Rows of one question, as on the Hugging Face hub, stay what they are.
    """
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no *.txt file: give a directory of RACE, such as RACE/train/middle")
    for file in files:
        # In the official directories an article is in the folder of its part, and its id begins with it.
        part = file.parent.name if file.parent.name in ("middle", "high") else ""
        for row in read_table(file, "jsonl", True, bad, numbers=numbers):
            if _has_text(row):
                yield row
                continue
            questions = row.value("questions") if row.has("questions") else None
            # An article without a list of questions is one bad row, which the conversion reports.
            for number in range(len(questions) if isinstance(questions, list) else 1):
                yield ArticleRow(file, row.line, row.number, row.cells, row.names, row.unit, number, part)


def _race_question(row: ArticleRow, split: str) -> ChoiceExample:
    """Question `row.question` of {"article", "questions": [..], "options": [[..], ..], "answers": ["A", ..], "id"}."""
    number = row.question
    questions, options = _list(row, "questions"), _list(row, "options")
    answers = _list(row, "answers") if row.has("answers") else [None] * len(questions)
    if not len(questions) == len(options) == len(answers):
        raise RowError(f"it has {len(questions)} questions, {len(options)} options and {len(answers)} answers")
    choices, question, answer = options[number], questions[number], answers[number]
    if not isinstance(question, str) or not isinstance(choices, list):
        raise RowError(f"question {number} or its options are not text")
    if not all(isinstance(choice, str) for choice in choices):
        raise RowError(f"an option of question {number} is not text")
    _enough(choices)
    index = None if answer is None else _letter(answer, LETTERS[: len(choices)])
    article = row.text("article")
    name = row.text("id") if row.has("id") else f"{row.path.name}:{row.line}"
    where = f"{row.where} question {number}"
    return ChoiceExample(
        f"{name}-{number}", where, split, question, tuple(choices), article, index, row.part, passage=name
    )


def _enough(choices: Sequence[str]) -> None:
    if len(choices) < FEWEST_CHOICES:
        raise RowError(f"it has {len(choices)} choices, expected {FEWEST_CHOICES} or more")


def _list(row: Row, key: str) -> list[Any]:
    value = row.value(key)
    if not isinstance(value, list):
        raise RowError(f'its "{key}" are not a list')
    return value


def _text(values: Mapping[str, Any], key: str) -> str:
    if not isinstance(values.get(key), str):
        raise RowError(f'it has no text "{key}" where there should be one')
    return values[key]


def _name(row: Row) -> str:
    return str(row.value("id")) if row.has("id") else str(row.number)


def _letter(answer: Any, names: Any) -> int:
    """Index of an answer among the names of the choices."""
    if not isinstance(answer, str) or answer not in list(names):
        raise RowError(f"its answer {answer!r} is none of {', '.join(names)}")
    return list(names).index(answer)
