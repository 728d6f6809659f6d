# SPDX-License-Identifier: Apache-2.0
"""Words of a text and the pieces they are made of."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_bert.data.tokenizers import SpannedTokens
from megatron_bert.tasks.answer_windows import widest_context

ZERO_WIDTH_JOINER = "\u200d"


def split_words(text: str) -> tuple[tuple[int, int], ...]:
    """Begin and end of the words of a text: runs of letters, digits and "_", and every other visible character alone.

    Combining marks belong to the character before them, and a zero-width joiner joins what is at its sides.
    """
    words: list[tuple[int, int]] = []
    for place, character in enumerate(text):
        if character.isspace():
            continue
        touching = bool(words) and words[-1][1] == place
        last = text[place - 1] if touching else ""
        joins = unicodedata.category(character)[0] == "M" or ZERO_WIDTH_JOINER in (character, last)
        both = _is_letter(character) and touching and _ends_with_letter(text[words[-1][0] : place])
        if touching and (joins or both):
            words[-1] = (words[-1][0], place + 1)
        else:
            words.append((place, place + 1))
    return tuple(words)


def _is_letter(character: str) -> bool:
    return character.isalnum() or character == "_"


def _ends_with_letter(word: str) -> bool:
    """Whether the last character, but for combining marks, is a letter, a digit or "_"."""
    bases = [character for character in word if unicodedata.category(character)[0] != "M"]
    return bool(bases) and _is_letter(bases[-1])


class WordPieces(NamedTuple):
    """The pieces of a word.

    Attributes:
        ids: token ids, one or more.
        first: which of them is the first with characters of the word; its prediction is the word's.
    """

    ids: list[int]
    first: int


def pieces_of_words(
    found: SpannedTokens, words: Sequence[tuple[int, int]], unknown: int, longest: int
) -> list[WordPieces]:
    """The pieces of each word.

    A piece belongs to the word its first character is in. A word without any, because normalization removes it, has
    the unknown token, so that every word has a prediction. Pieces between words are left out.

    Args:
        words: begin and end of the words, ascending.
        longest: words of more pieces lose the last ones.
    """
    ids: list[list[int]] = [[] for _ in words]
    first: list[int | None] = [None] * len(words)
    begins = np.array([begin for begin, _ in words])
    of_piece = np.searchsorted(begins, [begin for begin, _ in found.spans], side="right") - 1
    for piece, (begin, end), word in zip(found.ids, found.spans, of_piece.tolist(), strict=True):
        if word < 0 or begin >= words[word][1]:
            continue
        if first[word] is None and end > begin:
            first[word] = len(ids[word])
        ids[word].append(piece)
    pieces = []
    for own, start in zip(ids, first, strict=True):
        if start is None or start >= longest:
            pieces.append(WordPieces([unknown], 0))
        else:
            pieces.append(WordPieces(own[:longest], start))
    return pieces


class WordWindow(NamedTuple):
    """Some words of a sentence that is too long for one sequence.

    Attributes:
        begin: first word.
        end: behind the last.
        own: the words whose predictions count: those that no other window has more context for, ascending.
    """

    begin: int
    end: int
    own: list[int]


def word_windows(lengths: Sequence[int], room: int, stride: int) -> list[WordWindow]:
    """Windows of whole words; every word is its own in exactly one of them.

    Args:
        lengths: pieces of each word, at most `room`.
        room: most pieces of a window.
        stride: pieces by which a window moves on, if not so far that a word would be left out.
    """
    edges = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    count = len(lengths)
    windows: list[tuple[int, int]] = []
    begin = 0
    while begin < count or not windows:
        end = int(np.searchsorted(edges, edges[begin] + room, side="right")) - 1
        windows.append((begin, end))
        if end == count:
            break
        begin = min(max(begin + 1, int(np.searchsorted(edges, edges[begin] + stride))), end)
    widest = widest_context([(int(edges[begin]), int(edges[end])) for begin, end in windows])
    found = []
    for (begin, end), chosen in zip(windows, widest, strict=True):
        own = [word for word in range(begin, end) if chosen[edges[word] - edges[begin]]]
        if own or not count:
            found.append(WordWindow(begin, end, own))
    return found
