# SPDX-License-Identifier: Apache-2.0
"""Words of texts, their pieces, and windows of whole words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_bert.data.tokenizers import SpannedTokens
from megatron_bert.tasks.conll_files import joined
from megatron_bert.tasks.words import pieces_of_words, split_words, word_windows

from .support import letter_tokenizer


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat's mat.", ["The", "cat", "'", "s", "mat", "."]),
        ("  a_b\t3,4\n", ["a_b", "3", ",", "4"]),
        ("cafe\u0301 e\u0301t", ["cafe\u0301", "e\u0301t"]),
        ("\u0928\u092e\u0938\u094d\u0924\u0947!", ["\u0928\u092e\u0938\u094d\u0924\u0947", "!"]),
        (
            "\U0001f469\u200d\U0001f467 ok\U0001f600\U0001f600",
            ["\U0001f469\u200d\U0001f467", "ok", "\U0001f600", "\U0001f600"],
        ),
        ("\u4e2d\u6587\u3001x", ["\u4e2d\u6587", "\u3001", "x"]),
        ("!\ufe0fa", ["!\ufe0f", "a"]),
        ("", []),
        (" \u3000\n", []),
    ],
)
def test_words_of_a_text(text: str, words: list[str]) -> None:
    assert [text[begin:end] for begin, end in split_words(text)] == words


def test_joined_words() -> None:
    text, places = joined(["a", "b c", "\U0001f600", "d"])
    assert text == "a b c \U0001f600 d"
    assert [text[begin:end] for begin, end in places] == ["a", "b c", "\U0001f600", "d"]


def test_pieces(tmp_path: Path) -> None:
    tokenizer = letter_tokenizer(tmp_path)
    words = ["the", "\u200b", "CAT", "sits", "\ufe0f", "\u4e2d", "u.s."]
    text, places = joined(words)
    (found,) = tokenizer.encode_batch_with_spans([text])
    pieces = pieces_of_words(found, places, tokenizer.unk_id, 3)
    unknown = [tokenizer.unk_id]
    expected = [tokenizer.encode(word)[:3] or unknown for word in words]
    assert [word.ids for word in pieces] == expected
    assert [word.first for word in pieces] == [0] * len(words)
    assert pieces[1].ids == pieces[4].ids == unknown
    assert len(pieces[3].ids) == len(pieces[6].ids) == 3


def test_the_first_piece_is_the_first_with_characters() -> None:
    found = SpannedTokens([10, 11, 12, 13, 14], [(0, 0), (0, 2), (3, 3), (3, 5), (6, 6)])
    pieces = pieces_of_words(found, [(0, 2), (3, 5), (6, 7)], 1, 9)
    assert [(word.ids, word.first) for word in pieces] == [([10, 11], 1), ([12, 13], 1), ([1], 0)]
    # What is left of a long word must hold its first characters.
    assert pieces_of_words(found, [(0, 2)], 1, 1)[0].ids == [1]


def test_pieces_between_words_are_left_out() -> None:
    found = SpannedTokens([10, 11, 12], [(0, 1), (2, 3), (4, 5)])
    assert [word.ids for word in pieces_of_words(found, [(0, 1), (4, 5)], 1, 9)] == [[10], [12]]


@pytest.mark.parametrize("seed", range(6))
def test_every_word_is_own_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    room = int(rng.integers(4, 20))
    lengths = rng.integers(1, max(2, room // 2), size=int(rng.integers(1, 60))).tolist()
    stride = int(rng.integers(1, 30))
    found = word_windows(lengths, room, stride)
    assert sorted(word for window in found for word in window.own) == list(range(len(lengths)))
    for window in found:
        assert sum(lengths[window.begin : window.end]) <= room
        assert all(window.begin <= word < window.end for word in window.own)


def test_windows_overlap_by_the_stride() -> None:
    found = word_windows([1] * 12, 6, 3)
    assert [(window.begin, window.end) for window in found] == [(0, 6), (3, 9), (6, 12)]
    # The middle of each window is its own; the ends of the sentence have nothing beyond them.
    assert [window.own for window in found] == [[0, 1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11]]
    assert [(window.begin, window.end, window.own) for window in word_windows([], 6, 3)] == [(0, 0, [])]
    assert [window.own for window in word_windows([6, 6], 6, 1)] == [[0], [1]]
