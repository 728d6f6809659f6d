"""Cutting documents into samples: which sentences make up each training sample.

The rules are Megatron's (`build_mapping` of its BERT data set). Its random numbers are not: whether a sample is a short
one is decided by a hash of the seed and the sample's first sentence, so the result does not depend on which documents
are built together and needs no sequential pass. All documents advance together, one sample an iteration.
"""

import numpy as np

from megatron_bert.data.hashing import derive_key, keyed_hash
from parallel.errors import UserError

LONG_SENTENCE = 512
"""Documents with a longer sentence, in tokens, are taken for garbage and left out, as Megatron does."""

CHUNK_SENTENCES = 1 << 21
"""Sentences worked on at a time: bounds the memory; one longer document is one chunk."""


def build_samples(
    sizes: np.ndarray,
    document_indices: np.ndarray,
    documents: tuple[int, int],
    *,
    max_tokens: int,
    short_sequence_probability: float,
    minimum_sentences: int,
    seed: int,
    long_sentence: int = LONG_SENTENCE,
) -> np.ndarray:
    """Cut documents into samples of consecutive sentences.

    A sample ends when it has reached its target length and `minimum_sentences`, unless that would leave a single last
    sentence behind, and at the end of its document. The target is `max_tokens`, or for a share of the samples uniform
    in [2, max_tokens]. Documents with fewer than `minimum_sentences` or with a sentence beyond `long_sentence` give no
    samples. Sentences without tokens do not count.

    Args:
        sizes: int [S], tokens in each sentence.
        document_indices: int [D], first sentence of each document, then S.
        documents: Documents to use, (start, stop).
        max_tokens: Tokens a full sample holds, without the special ones; at least 2.
        short_sequence_probability: Share of samples with a shorter target.
        minimum_sentences: 2 for objectives that need two segments, otherwise 1.
        seed: Seed of the targets.
        long_sentence: Longest sentence allowed, in tokens.

    Returns:
        [N, 3] of (first sentence, last sentence exclusive, target length) in the order of the corpus; int32, or int64
        if sentence numbers need it.
    """
    start, stop = documents
    bounds = np.array(document_indices[start : stop + 1], dtype=np.int64)
    index_type = np.int64 if len(sizes) > np.iinfo(np.int32).max else np.int32
    parts = [np.empty((0, 3), dtype=index_type)]
    begin = 0
    while begin < len(bounds) - 1:
        # As many whole documents as fit a chunk, and at least one.
        end = int(np.searchsorted(bounds, bounds[begin] + CHUNK_SENTENCES, side="right")) - 1
        end = max(end, begin + 1)
        lengths, chunk_bounds, sentences = _compact(sizes, bounds[begin : end + 1])
        starts, ends = _usable(lengths, chunk_bounds, minimum_sentences, long_sentence)
        targets = _Targets(sentences, max_tokens, short_sequence_probability, seed)
        samples = _cut(lengths, starts, ends, targets, minimum_sentences)
        # Back to sentence numbers of the corpus; the last sentence, not the one after it, is known to exist.
        samples[:, 1] = sentences[samples[:, 1] - 1] + 1
        samples[:, 0] = sentences[samples[:, 0]]
        parts.append(samples.astype(index_type))
        begin = end
    return np.concatenate(parts)


def split_documents(weights: str, num_documents: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Divide a corpus into training, validation and test documents, with Megatron's rounding.

    Args:
        weights: Up to three non-negative numbers such as "969,30,1"; missing ones are 0, only ratios matter.
        num_documents: Documents in the corpus.

    Returns:
        Three ranges (start, stop), one after the other.

    Raises:
        UserError: `weights` is not such a list.
    """
    try:
        shares = [float(weight) for weight in weights.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= share < float("inf") for share in shares) or not any(shares):
        raise UserError(f'Split "{weights}" must be up to three non-negative numbers such as "969,30,1".')
    shares += [0.0] * (3 - len(shares))
    borders = [0]
    for share in shares:
        borders.append(borders[-1] + round(share / sum(shares) * num_documents))
    # What rounding gained or lost is moved to the first part, so that the last part ends with the corpus.
    surplus = borders[-1] - num_documents
    train, valid, test = (max(0, border - surplus) for border in borders[1:])
    return (0, train), (train, valid), (valid, test)


class _Targets:
    """Target length of the sample that starts at a given place of a chunk."""

    def __init__(self, sentences: np.ndarray, max_tokens: int, short_probability: float, seed: int) -> None:
        self.sentences, self.max_tokens, self.short_probability = sentences, max_tokens, short_probability
        self.choice_key, self.length_key = derive_key(seed, 0), derive_key(seed, 1)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        words = self.sentences[places].astype(np.uint64)
        short = keyed_hash(self.choice_key, words).astype(np.float64) < self.short_probability * 2.0**64
        lengths = keyed_hash(self.length_key, words) % np.uint64(self.max_tokens - 1) + np.uint64(2)
        return np.where(short, lengths.astype(np.int64), self.max_tokens)


def _compact(sizes: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take the sentences of some documents, without the empty ones.

    Returns:
        (tokens a sentence [s], document boundaries among these sentences, their numbers in the corpus [s])
    """
    lengths = np.array(sizes[bounds[0] : bounds[-1]], dtype=np.int32)
    local = bounds - bounds[0]
    kept = np.flatnonzero(lengths)
    if len(kept) < len(lengths):
        lengths, local = lengths[kept], np.searchsorted(kept, local)
    return lengths, local, kept + bounds[0]


def _usable(
    lengths: np.ndarray, bounds: np.ndarray, minimum_sentences: int, long_sentence: int
) -> tuple[np.ndarray, np.ndarray]:
    """First sentence and end of the documents that give samples."""
    starts, ends = bounds[:-1], bounds[1:]
    enough = ends - starts >= max(1, minimum_sentences)
    starts, ends = starts[enough], ends[enough]
    too_long = np.concatenate([[0], np.cumsum(lengths > long_sentence)])
    clean = too_long[ends] == too_long[starts]
    return starts[clean], ends[clean]


def _cut(
    lengths: np.ndarray, starts: np.ndarray, ends: np.ndarray, targets: _Targets, minimum_sentences: int
) -> np.ndarray:
    """Cut documents [starts, ends) of a chunk into samples, int64 [n, 3] in order."""
    before = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    parts = [np.empty((0, 3), dtype=np.int64)]
    while starts.size:
        target = targets(starts)
        stops = np.searchsorted(before, before[starts] + target)
        stops = np.maximum(stops, starts + minimum_sentences)
        stops = np.where(ends - stops > 1, stops, ends)
        parts.append(np.stack([starts, stops, target], axis=1))
        unfinished = stops < ends
        starts, ends = stops[unfinished], ends[unfinished]
    samples = np.concatenate(parts)
    return samples[np.argsort(samples[:, 0], kind="stable")]
