# SPDX-License-Identifier: Apache-2.0
"""How much text samples hold, without reading it."""

import numpy as np

from megatron_bert.data.indexed import IndexedDataset


def text_lengths(indexed: IndexedDataset, rows: np.ndarray, word_starts: np.ndarray, margin: int) -> np.ndarray:
    """Tokens of samples before they are cut to their target, int64 [n]; of the text, words around cuts alone are read.

    Args:
        rows: int [n, 5], of the sample index, see `build_samples`.
        word_starts: bool [V], which ids start a word.
        margin: how many tokens a cut inside a sentence is moved back at most, to the start of a word.
    """
    first, last, _, begin, end = rows.astype(np.int64).T
    starts, last_starts = (indexed.offsets[sentence] // indexed.dtype.itemsize for sentence in (first, last - 1))
    lengths = last_starts + end - starts - begin
    inside = np.flatnonzero(begin)
    lengths[inside] += _moved_back(indexed, starts[inside], begin[inside], word_starts, margin)
    inside = np.flatnonzero(end < indexed.sizes[last - 1])
    lengths[inside] -= _moved_back(indexed, last_starts[inside], end[inside], word_starts, margin)
    return lengths


def _moved_back(
    indexed: IndexedDataset, starts: np.ndarray, cuts: np.ndarray, word_starts: np.ndarray, margin: int
) -> np.ndarray:
    """By how much cuts inside sentences are moved back; they are counted from `starts`, where the sentences begin."""
    back = np.arange(margin + 1)
    places = np.maximum(cuts[:, None] - back, 0)
    # Ids beyond the vocabulary are refused where the sample is read.
    ids = np.clip(indexed.tokens_at(starts[:, None] + places), 0, len(word_starts) - 1)
    is_start = word_starts[ids] | (places == 0)
    return np.where(is_start.any(axis=1), is_start.argmax(axis=1), 0)
