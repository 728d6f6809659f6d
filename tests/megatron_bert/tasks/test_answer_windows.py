# SPDX-License-Identifier: Apache-2.0
"""Windows and answers in them, against definitions by loops."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_bert.data.tokenizers import SpannedTokens
from megatron_bert.tasks.answer_windows import WindowInstance, answer_tokens, candidates, widest_context, windows
from megatron_bert.tasks.encoding import Feature


@pytest.mark.parametrize(
    ("tokens", "room", "stride", "expected"),
    [
        (0, 5, 2, [(0, 0)]),
        (5, 5, 2, [(0, 5)]),
        (6, 5, 2, [(0, 5), (2, 6)]),
        (9, 5, 2, [(0, 5), (2, 7), (4, 9)]),
        (9, 5, 100, [(0, 5), (5, 9)]),  # a stride beyond the window leaves no token out
        (3, 1, 1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_windows(tokens: int, room: int, stride: int, expected: list) -> None:
    assert windows(tokens, room, stride) == expected


@pytest.mark.parametrize(
    ("tokens", "room", "stride"), [(1, 8, 3), (40, 16, 5), (37, 10, 10), (64, 30, 1), (23, 22, 22)]
)
def test_widest_context(tokens: int, room: int, stride: int) -> None:
    places = windows(tokens, room, stride)
    found = widest_context(places)
    assert [len(chosen) for chosen in found] == [end - begin for begin, end in places]
    for token in range(tokens):
        contexts = [
            min(token - begin, end - 1 - token) + 0.01 * (end - begin) if begin <= token < end else -1.0
            for begin, end in places
        ]
        holders = [
            number
            for number, (begin, end) in enumerate(places)
            if begin <= token < end and found[number][token - begin]
        ]
        assert holders == [contexts.index(max(contexts))]


def instance_of(size: int, offset: int = 3) -> WindowInstance:
    spans = np.stack([np.arange(size) * 2, np.arange(size) * 2 + 1], axis=1)
    nothing = Feature(np.zeros(0), np.zeros(0), np.zeros(0))
    return WindowInstance((nothing,), np.zeros(2), 0, offset, spans, np.ones(size, dtype=bool))


@pytest.mark.parametrize(
    ("size", "longest", "count"), [(1, 1, 1), (1, 5, 20), (7, 3, 4), (20, 30, 20), (20, 1, 5), (12, 4, 1000)]
)
def test_candidates_are_the_best_of_all_pairs(size: int, longest: int, count: int) -> None:
    rng = np.random.default_rng(size * longest)
    instance = instance_of(size)
    instance.spans[size // 3] = 0  # a token without characters
    instance.widest[size // 2] = size == 2
    logits = rng.normal(size=(size + 5, 2)).astype(np.float32)
    expected = sorted(
        (-(float(logits[3 + i, 0]) + float(logits[3 + j, 1])), int(instance.spans[i, 0]), int(instance.spans[j, 1]))
        for i in range(size)
        for j in range(i, min(i + longest, size))
        if instance.widest[i]
        and instance.spans[i, 1] > instance.spans[i, 0]
        and instance.spans[j, 1] > instance.spans[j, 0]
    )[:count]
    found = candidates(instance, logits, longest, count)
    assert [(c.begin, c.end) for c in found] == [(begin, end) for _, begin, end in expected]
    assert [c.score for c in found] == pytest.approx([-score for score, _, _ in expected])


def test_an_empty_window_has_no_candidate() -> None:
    assert candidates(instance_of(0), np.zeros((5, 2)), 30, 20) == []


def test_tokens_of_an_answer() -> None:
    found = SpannedTokens([1, 2, 3, 4], [(0, 3), (3, 3), (4, 6), (6, 9)])
    assert answer_tokens(found, 0, 3) == (0, 0)
    assert answer_tokens(found, 4, 9) == (2, 3)
    assert answer_tokens(found, 1, 5) == (0, 2)  # whole tokens, where the answer is part of one
    assert answer_tokens(found, 3, 4) is None
