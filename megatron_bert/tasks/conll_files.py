# SPDX-License-Identifier: Apache-2.0
"""Column files of tagged words, as in the CoNLL shared tasks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_bert.tasks.rows import BadRows, RowError, check_text, other_format
from megatron_bert.tasks.tables import no_rows, read_lines
from megatron_bert.tasks.tag_schemes import looks_like_tag
from megatron_bert.tasks.task import Example

DOCUMENT_START = "-DOCSTART-"


@dataclass(frozen=True)
class WordsExample(Example):
    """A sentence as words.

    Attributes:
        text: the sentence; words of a column file are joined by single spaces.
        words: begin and end of each word in the text, in characters.
        tags: the tag of each word; None where they are unknown.
    """

    text: str
    words: tuple[tuple[int, int], ...]
    tags: tuple[str, ...] | None = None

    @property
    def labeled(self) -> bool:
        """Whether its tags are known."""
        return self.tags is not None


@dataclass(frozen=True)
class Sentence:
    """A sentence as a file has it.

    Attributes:
        place: where it begins in the file.
        name: what names it in predictions.
        tags: their tags, or the numbers of these as text; None where the file has none.
    """

    place: str
    name: str
    words: tuple[str, ...]
    tags: tuple[str, ...] | None


def read_sentences(
    path: Path, token: int, tag: int, tags_may_lack: bool, bad: BadRows, numbers: Iterator[int]
) -> Iterator[Sentence]:
    """Sentences of a column file: one word per line, separated by empty lines; lines of -DOCSTART- are passed over.

    Columns are separated by tabs in lines that have one, and by spaces in others. Lines before the first word of a
    sentence that begin with "# " and have another number of columns than it, or no tag, are comments.

    Args:
        token: position of the word's column; from 0, negative ones from the end.
        tag: position of the tag's column.
        tags_may_lack: whether a file with a column for the word alone is fine, as test files may be.

    Raises:
        UserError: the file cannot be read, or holds no word.
    """
    empty = True
    for block in _blocks(path, tag):
        number, empty = next(numbers), False
        place = block[0][0]
        try:
            rows = []
            for line, text in block:
                place = line
                check_text(text)
                rows.append(_columns(text, token, tag, tags_may_lack))
            words, tags = in_sentence(rows)
        except RowError as reason:
            bad.add(path, f"line {place}", reason)
            continue
        yield Sentence(f"line {block[0][0]}", str(number), words, tags)
    if empty:
        raise no_rows(path)


def in_sentence(rows: Sequence[tuple[str, str | None]]) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Words and tags of a sentence, from a pair for each word.

    Raises:
        RowError: some words have a tag and some have none.
    """
    tags = tuple(tag for _, tag in rows if tag is not None)
    if tags and len(tags) != len(rows):
        raise RowError("some words of the sentence have a tag and some have none")
    return tuple(word for word, _ in rows), tags or None


def columns_of_tags(path: Path, most: int = 1000) -> list[int]:
    """Positions of the columns of a file that hold tags in each of its first lines; for messages."""
    found: set[int] | None = None
    for block in itertools.islice(_blocks(path, -1), most):
        for _, text in block:
            tagged = {place for place, cell in enumerate(_cells(text)) if looks_like_tag(cell)}
            found = tagged if found is None else found & tagged
    return sorted(found or ())


def _blocks(path: Path, tag: int) -> Iterator[list[tuple[int, str]]]:
    block: list[tuple[int, str]] = []
    for number, line in read_lines(path):
        if line.strip(" \t") and not line.startswith(DOCUMENT_START):
            block.append((number, line))
        elif block:
            yield from _without_comments(block, tag)
            block = []
    if block:
        yield from _without_comments(block, tag)


def _without_comments(block: list[tuple[int, str]], tag: int) -> Iterator[list[tuple[int, str]]]:
    """The block without the comments at its beginning; nothing where it has only comments."""
    first = next((place for place, (_, line) in enumerate(block) if not line.startswith("# ")), None)
    if first is None:
        # All words of the sentence may be "#", if they have tags.
        first = 0 if _tagged(block[0][1], tag) else len(block)
    elif first:
        width = len(_cells(block[first][1]))
        while first and len(_cells(block[first - 1][1])) == width and _tagged(block[first - 1][1], tag):
            first -= 1
    if block[first:]:
        yield block[first:]


def _tagged(line: str, tag: int) -> bool:
    cells = _cells(line)
    return -len(cells) <= tag < len(cells) and looks_like_tag(cells[tag])


def _cells(line: str) -> list[str]:
    # Other white space of Unicode, such as a no-break space, is part of a word.
    return line.split("\t") if "\t" in line else [cell for cell in line.split(" ") if cell]


def _columns(line: str, token: int, tag: int, tag_may_lack: bool) -> tuple[str, str | None]:
    cells = _cells(line)
    if not -len(cells) <= token < len(cells) or not cells[token]:
        raise RowError(f"it has no word in column {token} (it has {len(cells)} columns)")
    lacks = not -len(cells) <= tag < len(cells) or tag % len(cells) == token % len(cells)
    if lacks and not tag_may_lack:
        hint = f"; {other}" if (other := other_format(cells)) else ""
        raise RowError(f"it has no tag in column {tag} (it has {len(cells)} columns): see data.columns.tag{hint}")
    return cells[token], None if lacks else cells[tag]


def joined(words: Sequence[str]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Words joined by single spaces, and where each is."""
    places = []
    begin = 0
    for word in words:
        places.append((begin, begin + len(word)))
        begin += len(word) + 1
    return " ".join(words), tuple(places)
