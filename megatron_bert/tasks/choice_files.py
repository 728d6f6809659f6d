"""Files of multiple-choice questions: RACE, SWAG, ARC, and JSON lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_bert.tasks.rows import BadRows, Row, RowError, parse_object, read_lines, read_table
from megatron_bert.tasks.task import Example
from parallel.errors import UserError

Format = Literal["race", "swag", "arc", "jsonl"]

FEWEST_CHOICES = 2
DIGITS = "123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

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
        f"{directory} is no directory of RACE (train/, dev/, test/), SWAG (train.csv, val.csv, test.csv) or ARC "
        "(*-Train.jsonl, *-Dev.jsonl, *-Test.jsonl): give one, or data.train and data.valid"
    )


def read_choices(path: Path, split: str, given: str | None, bad: BadRows) -> Iterator[ChoiceExample]:
    """The questions of a file, or of a directory of RACE articles; bad rows go to `bad`.

    Args:
        path: file or directory.
        split: test splits may lack answers.
        given: the format; None to see it in the content.
        bad: told of rows that cannot be used.
    """
    kind = given or _format_of(path)
    if kind == "race":
        yield from _read_race(path, split, bad)
        return
    if kind == "swag":
        rows, convert = read_table(path, "csv", True, bad), _swag
    elif kind == "jsonl":
        rows, convert = read_table(path, "jsonl", True, bad), _json_line
    elif kind != "arc":
        raise UserError(f"data.format {kind} is no format of multiple choice: choose race, swag, arc or jsonl")
    elif path.suffix == ".csv":
        rows, convert = read_table(path, "csv", False, bad, equal_widths=False), _arc_row
    else:
        rows, convert = read_table(path, "jsonl", True, bad), _arc_line
    yield from _converted(rows, split, convert, bad)


def _format_of(path: Path) -> Format:
    if path.is_dir() or path.suffix == ".txt":
        return "race"
    first = next((line for _, line in read_lines(path)), "")
    if path.suffix == ".csv":
        return "swag" if "ending0" in first.split(",") else "arc"
    try:
        values = parse_object(first)
    except RowError:
        return "jsonl"  # which then says what is wrong with the line
    if "article" in values:
        return "race"
    return "arc" if isinstance(values.get("question"), dict) else "jsonl"


def _converted(
    rows: Iterator[Row], split: str, convert: Callable[[Row, str], ChoiceExample], bad: BadRows
) -> Iterator[ChoiceExample]:
    for row in rows:
        try:
            example = convert(row, split)
            _enough(example.choices)
            if example.answer is not None and not 0 <= example.answer < len(example.choices):
                raise RowError(f"its answer is choice {example.answer}, but it has {len(example.choices)} (from 0)")
            if example.answer is None and not split.startswith("test"):
                raise RowError("it has no answer")
        except RowError as reason:
            bad.add(row.path, f"line {row.line}", reason)
            continue
        yield example


def _swag(row: Row, split: str) -> ChoiceExample:
    """Columns sent1, sent2 (the beginning of the second sentence), ending0..., and label (absent in the test file)."""
    endings = [f"ending{number}" for number in range(len(row.cells)) if row.has(f"ending{number}")]
    begin = row.text("sent2")
    choices = tuple(f"{begin} {row.text(ending)}".strip() for ending in endings)
    answer = None
    if row.has("label"):
        label = row.text("label")
        if not label.isdecimal():
            raise RowError(f'its label "{label[:20]}" is not the number of a choice')
        answer = int(label)
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
    number = _letter(answer, names[: len(choices)])
    return ChoiceExample(str(row.number), row.where, split, question, tuple(choices), None, number)


def _arc_line(row: Row, split: str) -> ChoiceExample:
    """AI2's JSON lines: {"id", "question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}."""
    question = row.value("question")
    if not isinstance(question, Mapping) or not isinstance(question.get("choices"), list):
        raise RowError('its "question" is not an object with "stem" and "choices"')
    choices = question["choices"]
    if not all(isinstance(choice, Mapping) for choice in choices):
        raise RowError('one of its "choices" is not an object with "text" and "label"')
    names = [_text(choice, "label") for choice in choices]
    answer = _letter(row.text("answerKey"), names) if row.has("answerKey") else None
    texts = tuple(_text(choice, "text") for choice in choices)
    return ChoiceExample(_name(row), row.where, split, _text(question, "stem"), texts, None, answer)


def _json_line(row: Row, split: str) -> ChoiceExample:
    """{"question", "choices": [...], "context", "label": index from 0, "id"}; context and id may lack."""
    choices = row.value("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise RowError('its "choices" are not a list of texts')
    answer = row.value("label") if row.has("label") else None
    if answer is not None and (isinstance(answer, bool) or not isinstance(answer, int)):
        raise RowError(f'its "label" {answer!r} is not the number of a choice')
    context = row.text("context") if row.has("context") else None
    return ChoiceExample(
        _name(row), row.where, split, row.text("question"), tuple(choices), context, answer, passage=context or ""
    )


def _read_race(path: Path, split: str, bad: BadRows) -> Iterator[ChoiceExample]:
    """Articles with questions, one JSON object a line, in a *.txt file or all those below a directory."""
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no *.txt file: give a directory of RACE, such as RACE/train/middle")
    for file in files:
        # In the official directories an article is in the folder of its part, and its id begins with it.
        part = file.parent.name if file.parent.name in ("middle", "high") else ""
        for row in read_table(file, "jsonl", True, bad):
            questions = row.value("questions") if row.has("questions") else None
            # An article without a list of questions is one bad row, which the conversion reports.
            for number in range(len(questions) if isinstance(questions, list) else 1):
                yield from _converted(iter([row]), split, _race_question(number, part), bad)


def _race_question(number: int, part: str) -> Callable[[Row, str], ChoiceExample]:
    def convert(row: Row, split: str) -> ChoiceExample:
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
            f"{name}-{number}", where, split, question, tuple(choices), article, index, part, passage=name
        )

    return convert


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
