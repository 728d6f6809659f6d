# SPDX-License-Identifier: Apache-2.0
"""How much of a corpus its samples hold."""

from typing import NamedTuple

import numpy as np

from megatron_bert.data.indexed import IndexedDataset


class CorpusUse(NamedTuple):
    """What an epoch over some documents of a corpus takes of them.

    Attributes:
        documents: Documents with tokens.
        skipped_documents: Documents with tokens that give no sample, having fewer sentences than a pair needs.
        truncated_tokens: Tokens cut off pairs that are longer than their target, the same number in every epoch.
    """

    documents: int
    tokens: int
    samples: int
    skipped_documents: int
    skipped_tokens: int
    truncated_tokens: int


def corpus_use(indexed: IndexedDataset, documents: tuple[int, int], index: np.ndarray) -> CorpusUse:
    """Measure what the samples of an index hold; reads no tokens.

    Args:
        documents: The documents the index was built for, (start, stop).
        index: [N, 5], see `build_samples`.
    """
    bounds = indexed.document_indices[documents[0] : documents[1] + 1]
    places = _places(indexed, np.array(bounds))
    filled = np.diff(places) > 0
    first, last, target = index[:, 0], index[:, 1], index[:, 2]
    starts = _places(indexed, first) + index[:, 3]
    ends = _places(indexed, last - 1) + index[:, 4]
    used = np.unique(np.searchsorted(bounds, first, side="right"))
    lengths = ends - starts
    count, tokens = int(filled.sum()), int(places[-1] - places[0])
    truncated = int(np.maximum(lengths - target, 0).sum())
    return CorpusUse(count, tokens, len(index), count - len(used), tokens - int(lengths.sum()), truncated)


def _places(indexed: IndexedDataset, sentences: np.ndarray) -> np.ndarray:
    """Tokens of the corpus before each of some sentences, int64; for the number of all sentences, all tokens."""
    inside = np.minimum(sentences, len(indexed) - 1)
    places = indexed.offsets[inside] // indexed.dtype.itemsize
    return np.where(sentences < len(indexed), places, places + indexed.sizes[inside])
