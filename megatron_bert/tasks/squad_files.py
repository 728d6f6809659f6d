"""SQuAD files, versions 1.1 and 2.0."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bert.data.text_files import BYTE_ORDER_MARK
from megatron_bert.tasks.rows import BadRows, RowError
from megatron_bert.tasks.task import Example
from parallel.errors import UserError


class Answer(NamedTuple):
    """An answer: text, and where it begins in the context, in characters."""

    text: str
    start: int


@dataclass(frozen=True)
class SpanExample(Example):
    """A question about a text.

    Attributes:
        question: the question.
        context: the text.
        answers: right answers; several where people differed, () where there is none or they are unknown.
        labelled: whether `answers` are known.
        article: what questions on the same article share.
    """

    question: str
    context: str
    answers: tuple[Answer, ...] = ()
    labelled: bool = False
    article: str = ""


def read_squad(path: Path, split: str, no_answer: bool, bad: BadRows) -> Iterator[SpanExample]:
    """The questions of a file; bad ones go to `bad`.

    Args:
        path: the file.
        split: test splits may lack answers.
        no_answer: whether questions may have no answer.
        bad: told of questions that cannot be used, by their path in the file.

    Raises:
        UserError: the file is not UTF-8, not JSON, or has no list under "data".
    """
    content = _load(path)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise UserError(f'{path} is not a SQuAD file: expected an object with a list under "data"')
    seen: set[str | int] = set()
    for number, article in enumerate(content["data"]):
        place = f"data[{number}]"
        for inner, paragraph in _items(path, place, article, "paragraphs", bad):
            for where, question in _items(path, inner, paragraph, "qas", bad):
                try:
                    example = _example(path, where, split, paragraph, question, no_answer, str(number))
                    if example.id in seen:
                        raise RowError(f'its id "{example.id}" is that of an earlier question')
                except RowError as reason:
                    name = question.get("id") if isinstance(question, dict) else None
                    bad.add(path, f"{where} (id {name})", reason)
                    continue
                seen.add(example.id)
                yield example


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().removeprefix(BYTE_ORDER_MARK).decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give an existing file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}: convert the file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): give a SQuAD file") from None


def _items(path: Path, place: str, value: Any, key: str, bad: BadRows) -> Iterator[tuple[str, Any]]:
    """The items of the list `value[key]`, each with its path in the file."""
    if not isinstance(value, dict) or not isinstance(value.get(key), list):
        bad.add(path, place, RowError(f'it has no list under "{key}"'))
        return
    for number, item in enumerate(value[key]):
        yield f"{place}.{key}[{number}]", item


def _example(
    path: Path, place: str, split: str, paragraph: Any, question: Any, no_answer: bool, article: str
) -> SpanExample:
    context = _text(paragraph, "context")
    name, text = str(_value(question, "id")), _text(question, "question")
    where = f'{path} {place} (id "{name}")'
    impossible = question.get("is_impossible", False)
    if not isinstance(impossible, bool):
        raise RowError(f'its "is_impossible" is {impossible!r}, expected true or false')
    if "answers" not in question and not impossible:
        if split.startswith("test"):
            return SpanExample(name, where, split, text, context, article=article)
        raise RowError('it has no "answers"')
    answers = [] if impossible else _value(question, "answers")
    if not isinstance(answers, list):
        raise RowError('its "answers" are not a list')
    if not answers and not no_answer:
        raise RowError("it has no answer in the text; where that may be, set task.no_answer: true")
    found = tuple(_answer(answer, context) for answer in answers)
    return SpanExample(name, where, split, text, context, found, True, article)


def _answer(answer: Any, context: str) -> Answer:
    text, start = _text(answer, "text"), _value(answer, "answer_start")
    if isinstance(start, bool) or not isinstance(start, int):
        raise RowError(f'the "answer_start" of an answer is {start!r}, expected a whole number')
    if not text.strip():
        raise RowError("one of its answers is empty")
    if start < 0 or context[start : start + len(text)] != text:
        place = context.find(text)
        found = "is nowhere in the context" if place < 0 else f"is at character {place}, not at {start}"
        raise RowError(f"its answer {text[:40]!r} {found}")
    return Answer(text, start)


def _value(value: Any, key: str) -> Any:
    if not isinstance(value, dict) or key not in value:
        raise RowError(f'it has no "{key}"')
    return value[key]


def _text(value: Any, key: str) -> str:
    text = _value(value, key)
    if not isinstance(text, str):
        raise RowError(f'its "{key}" is not text')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f'its "{key}" holds half of a surrogate pair, which is no valid text') from None
    return text
