# SPDX-License-Identifier: Apache-2.0
"""How tags mark entities: BIO, IO, IOB1, BILOU and IOBES."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from seqeval import scheme as seqeval_scheme

from megatron_bert.tasks.rows import RowError

Scheme = Literal["BIO", "IO", "BILOU", "IOBES", "IOB1"]

OUTSIDE = "O"
PREFIXES: dict[Scheme, str] = {"BIO": "BI", "IO": "I", "BILOU": "BILU", "IOBES": "BIES", "IOB1": "BI"}
"""Scheme -> letters that stand before the type of an entity."""

_SEQEVAL: dict[Scheme, Any] = {
    "BIO": seqeval_scheme.IOB2,
    "IO": seqeval_scheme.IOB2,
    "IOB1": seqeval_scheme.IOB1,
    "BILOU": seqeval_scheme.BILOU,
    "IOBES": seqeval_scheme.IOBES,
}

_TAG = re.compile(r"O|[BIESLU](-.*[^-].*)?")

_LETTERS: dict[Scheme, tuple[str, str, str, str]] = {
    "BIO": ("B", "I", "I", "B"),
    "IO": ("I", "I", "I", "I"),
    "IOB1": ("I", "I", "I", "I"),
    "BILOU": ("B", "I", "L", "U"),
    "IOBES": ("B", "I", "E", "S"),
}
"""Letters of the first, inner and last word of an entity, and of an entity of one word."""


class WordSpan(NamedTuple):
    """An entity as words: [begin, end)."""

    begin: int
    end: int
    type: str


def all_tags(types: set[str], scheme: Scheme) -> tuple[str, ...]:
    """All tags of some types of entity: "O", then by type in code point order, in the order of the scheme's letters."""
    return (OUTSIDE, *(f"{prefix}-{name}" if name else prefix for name in sorted(types) for prefix in PREFIXES[scheme]))


def entity_type(tag: str, scheme: Scheme) -> str | None:
    """The type in a tag; None for "O", "" for a letter alone.

    Raises:
        RowError: it is not a tag of the scheme.
    """
    if tag == OUTSIDE:
        return None
    prefix, dash, name = tag.partition("-")
    if len(prefix) != 1 or prefix not in PREFIXES[scheme] or (dash and not name.strip("-")):
        allowed = ", ".join(f"{letter}-TYPE" for letter in PREFIXES[scheme])
        bare = " or ".join(PREFIXES[scheme])
        raise RowError(f'its tag "{tag[:40]}" is none of {scheme}: expected O, {allowed} (or {bare} alone)')
    return name


def looks_like_tag(text: str) -> bool:
    """Whether a text is a tag of some scheme."""
    return _TAG.fullmatch(text) is not None


def fitting_schemes(sentences: Iterable[Sequence[str]]) -> list[Scheme]:
    """The schemes that the tags of all sentences follow."""
    fitting: list[Scheme] = ["BIO", "IOB1", "IO", "BILOU", "IOBES"]
    for tags in sentences:
        fitting = [scheme for scheme in fitting if _follows(tags, scheme)]
    return fitting


def scheme_hint(sentences: Iterable[Sequence[str]], what: str, *, whole: bool = True) -> str:
    """Which scheme fits, as the end of a sentence; "" where none does.

    Args:
        sentences: their tags.
        what: names the tags.
        whole: whether they are sequences, not just names.
    """
    if whole:
        fitting = fitting_schemes(sentences)
    else:
        names = {tag[0] for tags in sentences for tag in tags if looks_like_tag(tag)} - {OUTSIDE}
        fitting = [scheme for scheme, letters in PREFIXES.items() if names <= set(letters)]
    return f"; {what} follow {' and '.join(fitting)}: set task.scheme: {fitting[0]}" if fitting else ""


def _follows(tags: Sequence[str], scheme: Scheme) -> bool:
    try:
        check_tags(tags, scheme)
    except RowError:
        return False
    return True


def scored(tags: Sequence[str], scheme: Scheme) -> tuple[list[str], Any]:
    """Tags as seqeval takes them, with its name of the scheme.

    In IO neighbors of one type are one entity, so the tags are those of BIO with B where the type changes.
    """
    if scheme == "IO":
        before = [OUTSIDE, *tags]
        tags = [f"B{tag[1:]}" if tag not in (OUTSIDE, last) else tag for last, tag in zip(before, tags)]
    return list(tags), _SEQEVAL[scheme]


def entities(tags: Sequence[str], scheme: Scheme) -> list[WordSpan]:
    """The entities that tags mark; what does not follow the scheme marks none, as when entities are scored."""
    if not tags:
        return []
    converted, seqeval_class = scored(tags, scheme)
    found = seqeval_scheme.Entities([converted], seqeval_class).entities[0]
    # A letter alone has no type, for which seqeval has a name of its own.
    return [WordSpan(entity.start, entity.end, entity.tag if converted[entity.start][1:] else "") for entity in found]


def tags_of(spans: Sequence[WordSpan], words: int, scheme: Scheme) -> list[str]:
    """The tags that mark some entities, which do not overlap and are in order."""
    first, inside, last, single = _LETTERS[scheme]
    tags = [OUTSIDE] * words
    before = WordSpan(-1, -1, "")
    for span in spans:
        length = span.end - span.begin
        letters = single if length == 1 else first + inside * (length - 2) + last
        if scheme == "IOB1" and (before.end, before.type) == (span.begin, span.type):
            letters = "B" + letters[1:]
        for place, letter in enumerate(letters, start=span.begin):
            tags[place] = f"{letter}-{span.type}" if span.type else letter
        before = span
    return tags


def check_tags(tags: Sequence[str], scheme: Scheme) -> None:
    """Refuse tags that do not follow the scheme, such as an I-TYPE after O in BIO.

    Raises:
        RowError: names the first tag that is wrong.
    """
    for tag in tags:
        entity_type(tag, scheme)
    right = tags_of(entities(tags, scheme), len(tags), scheme)
    for place, (tag, expected) in enumerate(zip(tags, right, strict=True)):
        if tag != expected:
            before = tags[place - 1] if place else "the beginning"
            raise RowError(f'tag "{tag}" of word {place + 1} after {before} does not follow {scheme}: see task.scheme')


def may_follow(before: str, tag: str, scheme: Scheme) -> bool:
    """Whether a tag may come after another; "O" stands for the beginning and the end of a sentence too."""
    if scheme == "IO":
        return True
    same_type = before[1:] == tag[1:]
    if scheme == "IOB1":  # B only parts neighbors of one type
        return tag[0] != "B" or (before != OUTSIDE and same_type)
    first, inside, last, _ = _LETTERS[scheme]
    open_before, goes_on = before[0] in (first, inside), tag[0] in (inside, last)
    if scheme == "BIO":  # an entity may end anywhere
        return not goes_on or (open_before and same_type)
    return (open_before and same_type) if goes_on else not open_before


def best_tags(log_probabilities: np.ndarray, tags: Sequence[str], scheme: Scheme) -> list[int]:
    """The most likely sequence of tags that follows the scheme (Viterbi), as indices into `tags`.

    Args:
        log_probabilities: float [words, tags], finite.
        tags: the names, with "O" among them, so that some sequence follows the scheme.
    """
    if not len(log_probabilities):
        return []
    refused = np.array([[0.0 if may_follow(a, b, scheme) else -np.inf for b in tags] for a in tags])
    best = log_probabilities[0] + refused[tags.index(OUTSIDE)]
    pointers = []
    for row in log_probabilities[1:]:
        paths = best[:, None] + refused
        pointers.append(paths.argmax(axis=0))
        best = paths.max(axis=0) + row
    chosen = [int((best + refused[:, tags.index(OUTSIDE)]).argmax())]
    for pointer in reversed(pointers):
        chosen.append(int(pointer[chosen[-1]]))
    return chosen[::-1]
