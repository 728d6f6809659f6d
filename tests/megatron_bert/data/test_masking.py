# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from megatron_bert.data.masking import MaskedTokens, mask_tokens

MASK, VOCAB = 4, 1000
RANDOM_IDS = np.arange(5, VOCAB, dtype=np.int32)


def sequence(
    rng: np.random.Generator, length: int, continued: float = 0.3
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[CLS] A [SEP] B [SEP] with random words: (tokens, word starts, special)."""
    tokens = rng.integers(5, VOCAB, size=length).astype(np.int32)
    special = np.zeros(length, dtype=bool)
    special[[0, length // 3, length - 1]] = True
    tokens[special] = 3
    return tokens, (rng.random(length) >= continued) | special, special


def mask(seed: int, tokens: np.ndarray, starts: np.ndarray, special: np.ndarray, **settings: float) -> MaskedTokens:
    rng = np.random.Generator(np.random.Philox(seed))
    options = {"max_predictions": 1000, **settings}
    return mask_tokens(tokens, starts, special, rng, mask_id=MASK, random_ids=RANDOM_IDS, **options)  # type: ignore[arg-type]


def words_of(starts: np.ndarray, special: np.ndarray) -> list[list[int]]:
    """Plain loop: the positions of each word."""
    words: list[list[int]] = []
    inside = False
    for place in range(len(starts)):
        if special[place]:
            inside = False
        elif inside and not starts[place]:
            words[-1].append(place)
        else:
            words.append([place])
            inside = True
    return words


@pytest.mark.parametrize("length", [5, 20, 128, 512])
@pytest.mark.parametrize("max_ngram", [1, 3])
def test_whole_words_within_the_budget_and_nothing_else(length: int, max_ngram: int) -> None:
    rng = np.random.default_rng(length)
    for seed in range(30):
        tokens, starts, special = sequence(rng, length)
        before = tokens.copy()
        masked = mask(seed, tokens, starts, special, max_ngram=max_ngram)
        assert np.array_equal(tokens, before)
        assert masked.positions.dtype == masked.labels.dtype == masked.tokens.dtype == np.int32
        chosen = set(masked.positions.tolist())
        assert np.array_equal(masked.positions, np.unique(masked.positions))
        assert 1 <= len(chosen) <= max(1, round(0.15 * length))
        assert not special[masked.positions].any()
        assert np.array_equal(masked.labels, before[masked.positions])
        untouched = np.setdiff1d(np.arange(length), masked.positions)
        assert np.array_equal(masked.tokens[untouched], before[untouched])
        cut_words = [word for word in words_of(starts, special) if 0 < len(chosen & set(word)) < len(word)]
        assert not cut_words or (len(cut_words) == 1 and chosen < set(cut_words[0])), "only if no word fits the budget"


def test_the_budget_is_used_up() -> None:
    rng = np.random.default_rng(0)
    counts = [len(mask(seed, *sequence(rng, 512)).positions) for seed in range(50)]
    assert min(counts) >= 75
    assert max(counts) == 77
    assert len(mask(0, *sequence(rng, 512), max_predictions=20).positions) == 20


def test_a_word_longer_than_the_budget_is_masked_in_part() -> None:
    tokens = np.arange(10, 22, dtype=np.int32)
    special = np.zeros(12, dtype=bool)
    special[[0, 11]] = True
    starts = special.copy()
    masked = mask(1, tokens, starts, special)
    assert masked.positions.tolist() == [1, 2]


def test_nothing_to_mask() -> None:
    masked = mask(1, np.array([2, 3, 3]), np.ones(3, dtype=bool), np.ones(3, dtype=bool))
    assert len(masked.positions) == len(masked.labels) == 0
    assert masked.tokens.tolist() == [2, 3, 3]


def test_shares_of_mask_kept_and_random_tokens() -> None:
    rng = np.random.default_rng(1)
    fates = np.zeros(3)
    for seed in range(300):
        tokens, starts, special = sequence(rng, 256)
        masked = mask(seed, tokens, starts, special)
        now = masked.tokens[masked.positions]
        hidden, kept = now == MASK, now == masked.labels
        fates += [hidden.sum(), kept.sum(), (~hidden & ~kept).sum()]
        assert (now[~hidden] >= 5).all(), "random tokens are never special"
    # About 11,400 tokens: the standard error of a share of 0.1 is 0.003.
    assert np.allclose(fates / fates.sum(), [0.8, 0.1, 0.1], atol=0.012)


def test_span_lengths_fall_off_as_one_over_n() -> None:
    length = 20001
    tokens = np.full(length, 9, dtype=np.int32)
    special = np.zeros(length, dtype=bool)
    special[0] = True
    positions = mask(2, tokens, np.ones(length, dtype=bool), special, mask_probability=0.02).positions
    runs = np.diff(np.flatnonzero(np.concatenate([[True], np.diff(positions) != 1, [True]])))
    shares = np.bincount(runs, minlength=4)[1:4] / len(runs)
    assert np.allclose(shares, [6 / 11, 3 / 11, 2 / 11], atol=0.09)


def test_spans_do_not_reach_over_special_tokens() -> None:
    # Six one-word segments; a budget of three words could only be one span if it crossed the separators.
    special = np.array([True, False] * 10)
    for seed in range(20):
        masked = mask(seed, np.arange(10, 30), np.ones(20, dtype=bool), special)
        assert len(masked.positions) == 3


def test_the_same_generator_gives_the_same_masks() -> None:
    drawn = sequence(np.random.default_rng(3), 128)
    first, again, other = mask(5, *drawn), mask(5, *drawn), mask(6, *drawn)
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(first.positions, other.positions)
