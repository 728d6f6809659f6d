"""Column files of tagged words, as in the CoNLL shared tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_bert.tasks.rows import BadRows, RowError, check_text, read_lines
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


@dataclass(frozen=True)
class Sentence:
    """Lines of a column file up to an empty one.

    Attributes:
        line: number of the first, from 1.
        words: the words.
        tags: their tags; None where the file has none.
    """

    line: int
    words: tuple[str, ...]
    tags: tuple[str, ...] | None


def read_sentences(path: Path, token: int, tag: int, tags_may_lack: bool, bad: BadRows) -> Iterator[Sentence]:
    """Sentences of a column file: one word a line, separated by empty lines; lines of -DOCSTART- are passed over.

    Columns are separated by tabs in lines that have one, and by spaces in others.

    Args:
        path: the file.
        token: position of the word's column; from 0, negative ones from the end.
        tag: position of the tag's column.
        tags_may_lack: whether a file with a column for the word alone is fine, as test files may be.
        bad: told of sentences with a line that cannot be used.

    Raises:
        UserError: the file cannot be read.
    """
    for block in _blocks(path):
        place = block[0][0]
        try:
            rows = []
            for line, text in block:
                place = line
                check_text(text)
                rows.append(_columns(text, token, tag, tags_may_lack))
            if len({found is None for _, found in rows}) > 1:
                raise RowError("some words of the sentence have a tag and some have none")
        except RowError as reason:
            bad.add(path, f"line {place}", reason)
            continue
        tags = tuple(found for _, found in rows if found is not None)
        yield Sentence(block[0][0], tuple(word for word, _ in rows), tags or None)


def _blocks(path: Path) -> Iterator[list[tuple[int, str]]]:
    block: list[tuple[int, str]] = []
    for number, line in read_lines(path):
        if line.strip(" \t") and not line.startswith(DOCUMENT_START):
            block.append((number, line))
        elif block:
            yield block
            block = []
    if block:
        yield block


def _columns(line: str, token: int, tag: int, tag_may_lack: bool) -> tuple[str, str | None]:
    # Other white space of Unicode, such as a no-break space, is part of a word.
    cells = line.split("\t") if "\t" in line else [cell for cell in line.split(" ") if cell]
    if not -len(cells) <= token < len(cells) or not cells[token]:
        raise RowError(f"it has no word in column {token} (it has {len(cells)} columns)")
    lacks = not -len(cells) <= tag < len(cells) or tag % len(cells) == token % len(cells)
    if lacks and not tag_may_lack:
        raise RowError(f"it has no tag in column {tag} (it has {len(cells)} columns)")
    return cells[token], None if lacks else cells[tag]


def joined(words: Sequence[str]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Words joined by single spaces, and where each is."""
    places = []
    begin = 0
    for word in words:
        places.append((begin, begin + len(word)))
        begin += len(word) + 1
    return " ".join(words), tuple(places)
