# SPDX-License-Identifier: Apache-2.0
"""Files of questions on texts: SQuAD, versions 1.1 and 2.0, and rows of one question each."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bert.data.text_files import BYTE_ORDER_MARK
from megatron_bert.tasks.rows import BadRows, Row, RowError, converted, parse_object, structured
from megatron_bert.tasks.settings import Column, TaskDataSettings
from megatron_bert.tasks.tables import TableKind, read_lines, read_table
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
        answers: right answers; several where people differed, () where there is none or they are unknown.
        labeled: whether `answers` are known.
        article: what questions on the same article share.
    """

    question: str
    context: str
    answers: tuple[Answer, ...] = ()
    labeled: bool = False
    article: str = ""


def holds_articles(path: Path) -> bool:
    """Whether a file is one JSON object, as SQuAD's are, rather than rows."""
    if path.suffix.lower() in (".csv", ".tsv"):
        return False
    first = next((line for _, line in read_lines(path) if line.strip()), "")
    if first.lstrip().startswith("["):
        return False
    try:
        return "data" in parse_object(first)
    except RowError:
        return path.suffix.lower() not in (".jsonl", ".ndjson")  # an object of several lines


@dataclass(frozen=True)
class QuestionReader:
    """Reads the questions of the files of one split.

    Attributes:
        data: says which columns of rows hold what.
        split: test splits may lack answers.
        no_answer: whether questions may have no answer.
        seen: ids of the questions read so far, which name them in predictions.
        articles: numbers of SQuAD's articles, over all files.
    """

    data: TaskDataSettings
    split: str
    no_answer: bool
    bad: BadRows
    seen: set[str] = field(default_factory=set)
    articles: Iterator[int] = field(default_factory=itertools.count)

    def read(self, path: Path, numbers: Iterator[int]) -> Iterator[SpanExample]:
        """The questions of a file: SQuAD's articles, or rows (JSON lines, a JSON array, a list under "data", CSV, TSV).

        Raises:
            UserError: the file is not UTF-8, not JSON, or holds neither articles nor rows.
        """
        if not holds_articles(path):
            kinds: dict[str, TableKind] = {".tsv": "tsv", ".csv": "csv"}
            kind = kinds.get(path.suffix.lower(), "jsonl")
            yield from self._flat(read_table(path, kind, True, self.bad, numbers=numbers))
            return
        content = _load(path)
        items = content.get("data") if isinstance(content, dict) else None
        if not isinstance(items, list):
            raise UserError(
                f'{path} is not a SQuAD file: expected an object with a list under "data", or JSON lines with '
                '"question", "context" and "answers"'
            )
        if items and all(isinstance(item, Mapping) and "context" in item for item in items):
            yield from self._flat(
                Row(path, place, next(numbers), list(item.values()), tuple(item), "item")
                for place, item in enumerate(items, 1)
            )
            return
        yield from self._articles(path, items)

    def _articles(self, path: Path, articles: list[Any]) -> Iterator[SpanExample]:
        for number, article in enumerate(articles):
            name = str(next(self.articles))
            for inner, paragraph in _items(path, f"data[{number}]", article, "paragraphs", self.bad):
                for where, question in _items(path, inner, paragraph, "qas", self.bad):
                    try:
                        yield self._question(path, where, paragraph, question, name)
                    except RowError as reason:
                        given = question.get("id") if isinstance(question, dict) else None
                        self.bad.add(path, f"{where} (id {given})", reason)

    def _question(self, path: Path, place: str, paragraph: Any, question: Any, article: str) -> SpanExample:
        context = _text(paragraph, "context")
        name, text = str(_value(question, "id")), _text(question, "question")
        answers = self._answers(question, "answers", context)
        return self._example(name, f'{path} {place} (id "{name}")', text, context, answers, article)

    def _flat(self, rows: Iterator[Row]) -> Iterator[SpanExample]:
        columns = "name its columns in data.columns (question, context, answers)"
        return converted(rows, self._of_row, self.bad, columns=columns)

    def _of_row(self, row: Row) -> SpanExample:
        columns = self.data.columns
        values = dict(zip(row.names or (), row.cells, strict=True))
        context = _text(values, _present(row, columns.context, "context"))
        question = _text(values, _present(row, columns.question, "question"))
        name = columns.id if columns.id is not None or not row.has("id") else "id"
        given = str(row.number) if name is None else str(row.value(name))
        column = str("answers" if columns.answers is None else columns.answers)
        if not self.split.startswith("test") and values.get("is_impossible") is not True:
            row.value(column)
        found = self._answers(values, column, context)
        article = values.get("title")
        return self._example(given, row.where, question, context, found, str(article or context))

    def _example(
        self, name: str, where: str, question: str, context: str, answers: tuple[Answer, ...] | None, article: str
    ) -> SpanExample:
        if name in self.seen:
            raise RowError(f'its id "{name}" is that of an earlier question')
        self.seen.add(name)
        return SpanExample(name, where, self.split, question, context, answers or (), answers is not None, article)

    def _answers(self, question: Mapping[str, Any], key: str, context: str) -> tuple[Answer, ...] | None:
        """The answers of a question; None where they are unknown, as they may be for testing."""
        impossible = question.get("is_impossible", False)
        if isinstance(impossible, str) and impossible.lower() in ("true", "false"):
            impossible = impossible.lower() == "true"  # as CSV has it
        if not isinstance(impossible, bool):
            raise RowError(f'its "is_impossible" is {impossible!r}, expected true or false')
        if question.get(key) in (None, "") and not impossible:
            if self.split.startswith("test"):
                return None
            raise RowError(f'it has no "{key}"')
        answers = [] if impossible else _listed(question[key], key)
        if not answers and not self.no_answer:
            raise RowError("it has no answer in the text; where that may be, set task.no_answer: true")
        return tuple(_answer(answer, context) for answer in answers)


def _present(row: Row, given: Column | None, usual: str) -> str:
    """The name of a column that the row has."""
    name = usual if given is None else given
    row.value(name)
    if isinstance(name, int):
        assert row.names is not None
        return row.names[name]
    return name


def _listed(value: Any, key: str) -> list[Any]:
    """Answers as a list of {"text", "answer_start"}; in rows also {"text": [..], "answer_start": [..]}."""
    value = structured(value, f'its "{key}"')
    if isinstance(value, dict):
        texts, starts = _value(value, "text"), _value(value, "answer_start")
        if not isinstance(texts, list) and not isinstance(starts, list):
            texts, starts = [texts], [starts]
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise RowError(f'its "{key}" have not as many "text" as "answer_start"')
        return [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(value, list):
        raise RowError(f'its "{key}" are not a list, nor an object with lists under "text" and "answer_start"')
    return value


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().removeprefix(BYTE_ORDER_MARK).decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give an existing file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}: convert the file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not JSON ({error}): give a SQuAD file, or JSON lines with a question each"
        ) from None


def _items(path: Path, place: str, value: Any, key: str, bad: BadRows) -> Iterator[tuple[str, Any]]:
    """The items of the list `value[key]`, each with its path in the file."""
    if not isinstance(value, dict) or not isinstance(value.get(key), list):
        bad.add(path, place, RowError(f'it has no list under "{key}"'))
        return
    for number, item in enumerate(value[key]):
        yield f"{place}.{key}[{number}]", item


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
        raise RowError(f'its "{key}" holds half of a surrogate pair, which is not valid text') from None
    return text
