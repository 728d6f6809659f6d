# SPDX-License-Identifier: Apache-2.0
"""Multiple-choice questions, one per row: which columns hold what, and how rows say which choice is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_bert.tasks.rows import Row, RowError, as_json, structured
from megatron_bert.tasks.settings import Column, ColumnSettings
from megatron_bert.tasks.task import UNKNOWN_CLASS

FEWEST_CHOICES = 2
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NO_ANSWER = (None, "", *UNKNOWN_CLASS)
"""What test rows have in place of an answer."""

CHOICES = ("choices", "options")
CONTEXT = ("context", "article")
ANSWER = ("label", "answerKey", "answer")
"""Usual names of columns, as in RACE, ARC and others on the Hugging Face hub."""


class FlatChoices(NamedTuple):
    """What a row says beside its question.

    Attributes:
        context: the passage; None where there is none.
        answer: index of the right choice, which may lie outside of them; None where unknown.
    """

    texts: tuple[str, ...]
    context: str | None
    answer: int | None


def flat_choices(row: Row, columns: ColumnSettings, *, labeled: bool) -> FlatChoices:
    """Choices, passage and answer of a row.

    Args:
        columns: names of columns; the usual ones where they are unset.
        labeled: whether an answer must be there.

    Raises:
        RowError: a column is missing or holds something else.
    """
    if isinstance(columns.choices, list):
        texts, names = _of_columns(row, columns.choices), None
    else:
        column = row.first_of(columns.choices, CHOICES)
        texts, names = texts_of_choices(structured(row.value(column), f"column {column!r}"), str(column))
    context: str | None = None
    column = row.first_of(columns.context, CONTEXT)
    if columns.context is not None or row.has(column):
        context = row.text(column) or None if row.value(column) is not None else None
    assert not isinstance(columns.label, list)
    column = row.first_of(columns.label, ANSWER)
    if not labeled and (not row.has(column) or row.value(column) in NO_ANSWER):
        return FlatChoices(texts, context, None)
    return FlatChoices(texts, context, answer_number(row.value(column), texts, names))


def _of_columns(row: Row, columns: Sequence[Column]) -> tuple[str, ...]:
    """Choices with a column each; the last ones may be empty, where a question has fewer."""
    given = [None if row.value(column) in (None, "") else row.text(column) for column in columns]
    while given and given[-1] is None:
        given.pop()
    return tuple(text or "" for text in given)


def texts_of_choices(value: Any, column: str = "choices") -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Texts of choices, and their names where they have some.

    Args:
        value: [text, ..], [{"text", "label"}, ..], or {"text": [..], "label": [..]}.
        column: what holds it, for messages.

    Raises:
        RowError: it is none of these.
    """
    names: Any = None
    texts = value
    if isinstance(value, dict):
        texts, names = value.get("text"), value.get("label")
    elif isinstance(value, list) and value and all(isinstance(choice, dict) for choice in value):
        texts, names = ([choice.get(key) for choice in value] for key in ("text", "label"))
    for what in (texts, names or []):
        if not isinstance(what, list) or not all(isinstance(text, str) for text in what):
            raise RowError(f'its "{column}" are not a list of texts, nor of "text" and "label": {as_json(value)}')
    if names is not None and (len(names) != len(texts) or len(set(names)) != len(names)):
        raise RowError(f'its "{column}" have {len(texts)} texts, but the labels {", ".join(names)}')
    return tuple(texts), None if names is None else tuple(names)


def answer_number(value: Any, texts: Sequence[str], names: Sequence[str] | None = None) -> int | None:
    """Index of the right choice; None for null and nothing.

    Args:
        value: where choices have names, one of them; else the number of the choice from 0, as a number or text, its
            letter from A, or its text.

    Raises:
        RowError: it is none of these, or says two things.
    """
    if value is None or value == "":
        return None
    if names is not None:
        if str(value) not in names:
            raise RowError(f"its answer {value!r} is none of {', '.join(names)}")
        return list(names).index(str(value))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise RowError(f"its answer {as_json(value)} is not the number, letter or text of a choice")
    text = value.strip().removesuffix(".0")  # as pandas writes numbers of a column with gaps
    if text.removeprefix("-").isdecimal():
        return int(text)
    meant = {place for place, choice in enumerate(texts) if choice == value}
    if len(text) == 1 and text.upper() in LETTERS[: len(texts)]:
        meant.add(LETTERS.index(text.upper()))
    if not meant:
        letters = LETTERS[len(texts[:26]) - 1]
        raise RowError(
            f"its answer {value!r} is not the number, letter or text of a choice: give 0 to {len(texts) - 1} or A to "
            f"{letters}"
        )
    if len(meant) > 1:
        raise RowError(f"its answer {value!r} may be choice {' or '.join(map(str, sorted(meant)))}: give the number")
    return meant.pop()
