# SPDX-License-Identifier: Apache-2.0
"""Whole-word n-gram masking for masked language modelling.

Spans of up to `max_ngram` whole words are chosen until a share of the tokens is used up; the length n of a span is
drawn with probability proportional to 1/n (Lan et al. 2020, as in Shoeybi et al. 2019). Of the chosen tokens 80% become
[MASK], 10% stay and 10% become a random ordinary token (Devlin et al. 2019).
"""

from typing import NamedTuple

import numpy as np

MASK_SHARE, KEEP_SHARE = 0.8, 0.1


class MaskedTokens(NamedTuple):
    """Tokens after masking, with what was there before.

    Attributes:
        tokens: int32 [n], the sequence as the model sees it.
        positions: int32 [k], chosen places, ascending.
        labels: int32 [k], the original ids at these places.
    """

    tokens: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


def mask_tokens(
    tokens: np.ndarray,
    word_starts: np.ndarray,
    special: np.ndarray,
    rng: np.random.Generator,
    *,
    mask_id: int,
    random_ids: np.ndarray,
    max_predictions: int,
    mask_probability: float = 0.15,
    max_ngram: int = 3,
) -> MaskedTokens:
    """Choose and replace tokens of one sequence.

    Args:
        tokens: int [n], the sequence with its special tokens; left unchanged.
        word_starts: bool [n], where a word starts; all true masks single pieces.
        special: bool [n], tokens that are never chosen.
        random_ids: int [any], ids a random replacement is taken from.
        max_predictions: Upper bound of k, at least 1.
        mask_probability: Share of the n tokens to choose.
        max_ngram: Longest span in words, at least 1.

    Returns:
        The masked sequence. k is at least 1 if any token may be chosen.
    """
    budget = min(max_predictions, max(1, round(len(tokens) * mask_probability)))
    positions = _choose_positions(word_starts, special, budget, max_ngram, rng)
    labels = tokens[positions].astype(np.int32)
    masked = tokens.astype(np.int32)
    fate = rng.random(len(positions))
    replacements = random_ids[rng.integers(len(random_ids), size=len(positions))]
    masked[positions] = np.where(
        fate < MASK_SHARE, mask_id, np.where(fate < MASK_SHARE + KEEP_SHARE, labels, replacements)
    )
    return MaskedTokens(masked, positions, labels)


def _choose_positions(
    word_starts: np.ndarray, special: np.ndarray, budget: int, max_ngram: int, rng: np.random.Generator
) -> np.ndarray:
    """Choose at most `budget` positions in whole words, ascending int32."""
    first, end, run = _words(word_starts, special)
    count = len(first)
    if count == 0:
        return np.empty(0, dtype=np.int32)
    spans = _choose_spans(first.tolist(), end.tolist(), run.tolist(), budget, max_ngram, rng)
    if not spans:
        # Every word is longer than the budget: part of one word is better than a sample that teaches nothing.
        begin = int(first[rng.integers(count)])
        spans = [(begin, begin + budget)]
    chosen = np.zeros(len(special), dtype=bool)
    for begin, stop in spans:
        chosen[begin:stop] = True
    return np.flatnonzero(chosen).astype(np.int32)


def _words(word_starts: np.ndarray, special: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut a sequence into words: (first position, end position, number of the run of words between special tokens)."""
    ordinary = ~special
    follows_special = np.empty_like(special)
    follows_special[0] = True
    follows_special[1:] = special[:-1]
    starts = ordinary & (word_starts | follows_special)
    # A word reaches up to the next start of a word or the next special token.
    borders = np.flatnonzero(starts | special)
    is_word = starts[borders]
    ends = np.append(borders[1:], len(special))
    return borders[is_word], ends[is_word], np.cumsum(~is_word)[is_word]


def _choose_spans(
    first: list[int], end: list[int], run: list[int], budget: int, max_ngram: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Choose disjoint spans of words with at most `budget` tokens in all, as (begin, end) positions.

    Words are visited in random order; each proposes the span of a drawn length that starts there. A span that reaches
    over a special token or exceeds what is left of the budget is shortened word by word, one that overlaps an earlier
    span is dropped.
    """
    count = len(first)
    shares = np.cumsum(1.0 / np.arange(1, max_ngram + 1))
    order = rng.permutation(count).tolist()
    lengths = (np.searchsorted(shares, rng.random(count) * shares[-1], side="right") + 1).tolist()
    taken = bytearray(count)
    spans = []
    for word, length in zip(order, lengths):
        last = min(word + length, count) - 1
        while last >= word and (run[last] != run[word] or end[last] - first[word] > budget):
            last -= 1
        if last < word or any(taken[word : last + 1]):
            continue
        taken[word : last + 1] = b"\x01" * (last + 1 - word)
        spans.append((first[word], end[last]))
        budget -= end[last] - first[word]
        if budget == 0:
            break
    return spans
