# SPDX-License-Identifier: Apache-2.0
"""Sentences with tagged words in JSON lines and tables: a sentence per row, or a word per row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_bert.tasks.conll_files import Sentence, in_sentence
from megatron_bert.tasks.rows import BadRows, Row, RowError, as_json, converted, no_such_column, structured
from megatron_bert.tasks.settings import TaskDataSettings
from megatron_bert.tasks.tables import checked_cells, column_names, read_cells, read_table
from parallel.errors import UserError

TOKENS = ("tokens", "words")
TAGS = ("tags", "ner_tags")
WORD = ("token", "word", *TOKENS)
TAG = ("tag", *TAGS)
COLUMNS = "name its columns in data.columns (token, tag)"


@dataclass(frozen=True)
class TokenRows:
    """Reads the sentences of JSON lines and tables.

    Attributes:
        tags_may_lack: whether tags may be missing, as in test files.
    """

    data: TaskDataSettings
    tags_may_lack: bool
    bad: BadRows
    numbers: Iterator[int]

    def read(self, path: Path, kind: Literal["csv", "tsv", "jsonl"]) -> Iterator[Sentence]:
        """The sentences of a file.

        Raises:
            UserError: it cannot be read, holds no row, has no such columns, or does not show where sentences end.
        """
        if kind == "jsonl":
            rows = read_table(path, "jsonl", True, self.bad, numbers=self.numbers)
            yield from converted(rows, self._sentence, self.bad, columns=COLUMNS)
            return
        if self._holds_lists(path, kind):
            rows = read_table(path, kind, self.data.header, self.bad, numbers=self.numbers)
            yield from converted(rows, self._sentence, self.bad, columns=COLUMNS)
        else:
            yield from converted(self._of_words(path, kind), self._joined, self.bad, columns=COLUMNS)

    def _holds_lists(self, path: Path, kind: Literal["csv", "tsv"]) -> bool:
        """Whether the first row of a table has all words of a sentence."""
        row = next(read_table(path, kind, self.data.header, BadRows("skip")), None)
        column = None if row is None else row.first_of(self._token(), WORD)
        if row is None or column is None or not row.has(column):
            return False
        text = str(row.value(column)).strip()
        return text.startswith("[") and text.endswith("]") and len(text) > 1

    def _token(self) -> str | int | None:
        token = self.data.columns.token
        return 0 if token is None and not self.data.header else token

    def _tag(self) -> str | int | None:
        tag = self.data.columns.tag
        return -1 if tag is None and not self.data.header else tag

    def _sentence(self, row: Row) -> Sentence:
        """A sentence per row: a list of words and a list of tags."""
        column = row.first_of(self._token(), TOKENS)
        words = structured(row.value(column), f"column {column!r}")
        if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
            raise RowError(f"column {column!r} holds {as_json(words)}, expected a list of words")
        if not words:
            raise RowError(f"column {column!r} holds no word")
        tags = self._tags(row, words)
        name = str(row.number) if self.data.columns.id is None else str(row.value(self.data.columns.id))
        return Sentence(row.place, name, tuple(words), tags)

    def _tags(self, row: Row, words: list[str]) -> tuple[str, ...] | None:
        column = row.first_of(self._tag(), TAGS)
        if self.tags_may_lack and (not row.has(column) or row.value(column) in (None, "", [])):
            return None
        tags = structured(row.value(column), f"column {column!r}")
        if not isinstance(tags, list) or not all(isinstance(t, str | int) and not isinstance(t, bool) for t in tags):
            raise RowError(f"column {column!r} holds {as_json(tags)}, expected a list of tags")
        if len(tags) != len(words):
            raise RowError(f"it has {len(words)} words, but {len(tags)} tags in column {column!r}")
        return tuple(map(str, tags))

    def _of_words(self, path: Path, kind: Literal["csv", "tsv"]) -> Iterator[Row]:
        """A row for each sentence of a table with a word per row, whose cells are the words' rows.

        A sentence ends at an empty line, or where the column of `data.columns.id` changes; an empty cell there goes on.
        """
        names: tuple[str, ...] | None = None
        block: list[Row | tuple[int, RowError]] = []
        last, ends = "", 0
        for line, cells in read_cells(path, kind):
            if self.data.header and names is None:
                if cells:
                    names = column_names(path, line, cells)
                    self._check_names(Row(path, line, 0, names, names))
                continue
            row = self._word_row(path, line, cells, names)
            new = ""
            if isinstance(row, Row) and self.data.columns.id is not None:
                new = str(row.value(self.data.columns.id)) if row.has(self.data.columns.id) else ""
            if block and (row is None or (new and new != last)):
                yield Row(path, _line(block[0]), next(self.numbers), block, None)
                block, ends = [], ends + 1
            ends += row is None
            last = new or last
            block += [row] if row is not None else []
        if not ends and self.data.columns.id is None and len(block) > 1:
            raise UserError(
                f"{path} does not show where sentences end: put an empty line after each, or name the column that "
                "numbers them in data.columns.id"
            )
        if block:
            yield Row(path, _line(block[0]), next(self.numbers), block, None)

    def _check_names(self, names: Row) -> None:
        wanted = [names.first_of(self._token(), WORD), self.data.columns.id]
        if not self.tags_may_lack:
            wanted.append(names.first_of(self._tag(), TAG))
        for column in wanted:
            if column is not None and not names.has(column):
                raise no_such_column(names, column, COLUMNS)

    @staticmethod
    def _word_row(
        path: Path, line: int, cells: list[str] | RowError, names: tuple[str, ...] | None
    ) -> Row | tuple[int, RowError] | None:
        """The row of a word; None for an empty line, and why where it cannot be read."""
        if not cells or (isinstance(cells, list) and not any(cell.strip() for cell in cells)):
            return None
        try:
            values = checked_cells(cells)
            if names is not None and len(values) != len(names):
                raise RowError(f"it has {len(values)} columns, expected {len(names)}")
        except RowError as reason:
            return line, reason
        return Row(path, line, line, values, names)

    def _joined(self, sentence: Row) -> Sentence:
        pairs: list[tuple[str, str | None]] = []
        name = str(sentence.number)
        for word in sentence.cells:
            if not isinstance(word, Row):
                raise RowError(f"{word[1]} (line {word[0]})")
            column = word.first_of(self._token(), WORD)
            text = word.text(column)
            if not text:
                raise RowError(f"it has no word in column {column!r} (line {word.line})")
            tag = word.first_of(self._tag(), TAG)
            lacks = self.tags_may_lack and (not word.has(tag) or word.value(tag) == "")
            pairs.append((text, None if lacks else word.text(tag)))
        if self.data.columns.id is not None:
            name = str(sentence.cells[0].value(self.data.columns.id)) or name
        words, tags = in_sentence(pairs)
        return Sentence(sentence.place, name, words, tags)


def _line(row: Any) -> int:
    return row.line if isinstance(row, Row) else row[0]
