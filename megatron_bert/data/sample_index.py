# SPDX-License-Identifier: Apache-2.0
"""Cutting documents into samples: which tokens make up each training sample.

Pairs of segments follow Megatron's rules (`build_mapping` of its BERT data set), except that a sentence longer than a
sample is cut into pieces instead of dropping its document. Single segments use every token once. Megatron's random
numbers are not followed: whether a sample is a short one is decided by a hash of the seed and the place it starts at,
so the result does not depend on which documents are built together and needs no sequential pass. All documents advance
together, one sample an iteration.
"""

from typing import NamedTuple

import numpy as np

from megatron_bert.data.hashing import derive_key, keyed_hash
from parallel.errors import UserError

#: Numbers of a sample in the index.
COLUMNS = 5


CHUNK_SENTENCES = 1 << 21
"""Sentences worked on at a time: bounds the memory; one longer document is one chunk."""

OFFSET_SHIFT = np.uint64(40)
"""Where the offset of a sample inside its first sentence goes in the word that is hashed; 0 at a sentence's start."""


def build_samples(
    sizes: np.ndarray,
    document_indices: np.ndarray,
    documents: tuple[int, int],
    *,
    max_tokens: int,
    short_sequence_probability: float,
    pairs: bool,
    seed: int,
    filled: bool = False,
) -> np.ndarray:
    """Cut documents into samples of consecutive tokens.

    The target length of a sample is `max_tokens`, or for a share of the samples uniform in [2, max_tokens].

    Pairs: a sample holds two or more sentences. It ends when it has reached its target, unless that would leave a
    single last sentence behind, and at the end of its document. A sentence beyond `max_tokens` counts as several, see
    `piece_starts`. Documents of one sentence give no samples; a sample beyond its target is truncated when it is read.

    Single segments: a sample ends with the last sentence that fits its target; where none fits, inside the sentence.
    Filled ones end inside the sentence in any case, to come as close to their target as cuts allow. Every token belongs
    to exactly one sample.

    Cuts inside a sentence are nominal: the reader may move them back to the start of a word, by `cut_margin` tokens
    at most; no sample exceeds `max_tokens` or becomes empty by that.

    Args:
        sizes: int [S], tokens in each sentence; those without tokens do not count.
        document_indices: int [D], first sentence of each document, then S.
        documents: Documents to use, (start, stop).
        max_tokens: Tokens a full sample holds, without the special ones; at least 2.
        short_sequence_probability: Share of samples with a shorter target.
        pairs: Whether samples are made for two segments.
        filled: Whether single segments end where they are full, and not where a sentence does.

    Returns:
        [N, 5] of (first sentence, last sentence exclusive, tokens to keep, tokens of the first sentence before the
        sample, tokens of the last sentence up to the end of the sample) in the order of the corpus; int32, or int64
        if sentence numbers need it. The tokens to keep are the target of a pair, and all of a single segment.
    """
    start, stop = documents
    bounds = np.array(document_indices[start : stop + 1], dtype=np.int64)
    index_type = np.int64 if len(sizes) > np.iinfo(np.int32).max else np.int32
    targets = _Targets(max_tokens, short_sequence_probability, seed)
    parts = [np.empty((0, COLUMNS), dtype=index_type)]
    begin = 0
    while begin < len(bounds) - 1:
        # As many whole documents as fit a chunk, and at least one.
        end = int(np.searchsorted(bounds, bounds[begin] + CHUNK_SENTENCES, side="right")) - 1
        end = max(end, begin + 1)
        sentences = _compact(sizes, bounds[begin : end + 1])
        if pairs:
            cut = _cut_pairs(_in_pieces(sentences, max_tokens), targets)
        else:
            cut = _cut_single(sentences, targets, filled)
        parts.append(cut.astype(index_type))
        begin = end
    return np.concatenate(parts)


def cut_margin(max_tokens: int, *, filled: bool = False) -> int:
    """How many tokens a cut inside a sentence may be moved back, to the start of a word.

    Samples leave as much room for it as it takes, so it is small for those that are to be filled.
    """
    return min(7, max_tokens // 8, *([max(1, max_tokens // 100)] if filled else []))


def piece_starts(size: int, max_tokens: int) -> np.ndarray:
    """Where the pieces of a sentence of `size` tokens start that are used as sentences of pairs, int64.

    One piece if it has at most `max_tokens`; otherwise as few even ones as leave room for the margin of the cuts.
    """
    count = _piece_count(np.array([size]), max_tokens)
    return np.arange(count[0]) * size // count[0]


def split_documents(weights: str, num_documents: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Ranges (start, stop) of a corpus's training, validation and test documents, with Megatron's rounding.

    Args:
        weights: Up to three non-negative numbers such as "969,30,1"; missing ones are 0, only ratios matter.

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


class _Sentences(NamedTuple):
    """Consecutive sentences of some documents, or pieces of sentences, none without tokens.

    Attributes:
        lengths: int64 [s], tokens in each.
        bounds: int64 [d], where each document starts among them, then s.
        numbers: int64 [s], number in the corpus of the sentence each is, or is a piece of.
        begins: int64 [s], tokens of its sentence before each piece.
    """

    lengths: np.ndarray
    bounds: np.ndarray
    numbers: np.ndarray
    begins: np.ndarray

    def rows(self, first: np.ndarray, last: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Rows of the sample index for samples of the whole sentences `first` to `last - 1`."""
        end = self.begins[last - 1] + self.lengths[last - 1]
        return np.stack([self.numbers[first], self.numbers[last - 1] + 1, target, self.begins[first], end], axis=1)


class _Targets:
    """Target length of the sample that starts at a given place of the corpus."""

    def __init__(self, max_tokens: int, short_probability: float, seed: int) -> None:
        self.max_tokens, self.short_probability = max_tokens, short_probability
        self.choice_key, self.length_key = derive_key(seed, 0), derive_key(seed, 1)

    def __call__(self, numbers: np.ndarray, begins: np.ndarray) -> np.ndarray:
        words = numbers.astype(np.uint64) ^ (begins.astype(np.uint64) << OFFSET_SHIFT)
        short = keyed_hash(self.choice_key, words).astype(np.float64) < self.short_probability * 2.0**64
        lengths = keyed_hash(self.length_key, words) % np.uint64(self.max_tokens - 1) + np.uint64(2)
        return np.where(short, lengths.astype(np.int64), self.max_tokens)


def _compact(sizes: np.ndarray, bounds: np.ndarray) -> _Sentences:
    """Take the sentences of some documents, without the empty ones."""
    lengths = np.array(sizes[bounds[0] : bounds[-1]], dtype=np.int64)
    local = bounds - bounds[0]
    kept = np.flatnonzero(lengths)
    if len(kept) < len(lengths):
        lengths, local = lengths[kept], np.searchsorted(kept, local)
    return _Sentences(lengths, local, kept + bounds[0], np.zeros_like(lengths))


def _piece_count(lengths: np.ndarray, max_tokens: int) -> np.ndarray:
    most = max_tokens - cut_margin(max_tokens)
    return np.where(lengths > max_tokens, -(-lengths // most), 1)


def _in_pieces(sentences: _Sentences, max_tokens: int) -> _Sentences:
    """The same documents with sentences beyond `max_tokens` in pieces."""
    lengths = sentences.lengths
    if not len(lengths) or lengths.max() <= max_tokens:
        return sentences
    counts = _piece_count(lengths, max_tokens)
    firsts = np.concatenate([[0], np.cumsum(counts)])
    owners = np.repeat(np.arange(len(lengths)), counts)
    part = np.arange(firsts[-1]) - firsts[owners]
    begins, ends = (lengths[owners] * place // counts[owners] for place in (part, part + 1))
    return _Sentences(ends - begins, firsts[sentences.bounds], sentences.numbers[owners], begins)


def _cut_pairs(sentences: _Sentences, targets: _Targets) -> np.ndarray:
    """Samples of two sentences or more, int64 [n, 5] in order."""
    before = np.concatenate([[0], np.cumsum(sentences.lengths)])
    starts, ends = sentences.bounds[:-1], sentences.bounds[1:]
    enough = ends - starts >= 2
    starts, ends = starts[enough], ends[enough]
    parts, places = [np.empty((0, COLUMNS), dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    while starts.size:
        target = targets(sentences.numbers[starts], sentences.begins[starts])
        stops = np.searchsorted(before, before[starts] + target)
        stops = np.maximum(stops, starts + 2)
        stops = np.where(ends - stops > 1, stops, ends)
        parts.append(sentences.rows(starts, stops, target))
        places.append(starts)
        unfinished = stops < ends
        starts, ends = stops[unfinished], ends[unfinished]
    return np.concatenate(parts)[np.argsort(np.concatenate(places), kind="stable")]


def _cut_single(sentences: _Sentences, targets: _Targets, filled: bool) -> np.ndarray:
    """Samples that hold every token once, int64 [n, 5] in order."""
    margin = cut_margin(targets.max_tokens, filled=filled)
    most = targets.max_tokens - margin
    before = np.concatenate([[0], np.cumsum(sentences.lengths)])
    places, ends = before[sentences.bounds[:-1]], before[sentences.bounds[1:]]
    places, ends = places[places < ends], ends[places < ends]
    parts, starts = [np.empty((0, COLUMNS), dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    while places.size:
        first = np.searchsorted(before, places, side="right") - 1
        begin = places - before[first]
        target = targets(sentences.numbers[first], begin)
        # A start inside a sentence may be moved back by the margin, and so may a cut after it.
        reach = places + np.where(begin > 0, np.minimum(target, most), target)
        if filled:
            stops = np.minimum(np.maximum(reach, places + margin + 1), ends)
        else:
            border = before[np.searchsorted(before, np.minimum(reach, ends), side="right") - 1]
            left = before[first + 1] - places
            even = -(-left // -(-left // most))
            piece = np.minimum(np.clip(target, margin + 1, most), even)
            stops = np.where(border > places, border, places + piece)
        last = np.searchsorted(before, stops)
        rows = sentences.rows(first, last, stops - places)
        rows[:, 3], rows[:, 4] = begin, stops - before[last - 1]
        parts.append(rows)
        starts.append(places)
        unfinished = stops < ends
        places, ends = stops[unfinished], ends[unfinished]
    return np.concatenate(parts)[np.argsort(np.concatenate(starts), kind="stable")]
