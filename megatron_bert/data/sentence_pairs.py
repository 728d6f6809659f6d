# SPDX-License-Identifier: Apache-2.0
"""Training samples: one or two segments of a document, masked, as a pure function of (seed, epoch, sample)."""

import hashlib
import os
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from megatron_bert.data.corpus_use import CorpusUse, corpus_use
from megatron_bert.data.hashing import derive_key
from megatron_bert.data.indexed import IndexedDataset
from megatron_bert.data.masking import mask_tokens
from megatron_bert.data.sample_index import COLUMNS, build_samples, cut_margin, piece_starts, split_documents
from megatron_bert.data.sample_lengths import text_lengths
from megatron_bert.data.tokenizers import Tokenizer
from parallel.errors import UserError
from parallel.whole_files import reporting, whole_file

__all__ = ["Objective", "PairDataset", "Sample", "build_samples", "split_documents"]

Objective = Literal["sop", "nsp", "none"]
"""What the pair label says: sentence order (swapped?), next sentence (random?), or nothing (one segment)."""

INDEX_VERSION = 2
"""Part of the name of cached sample indices; raised when the rules of `build_samples` change."""


class Sample(NamedTuple):
    """One unpadded training sample of n tokens with k masked ones.

    Attributes:
        tokens: int32 [n], [CLS] A [SEP] B [SEP] after masking; without B and its [SEP] for objective "none".
        types: int8 [n], 0 for [CLS] A [SEP] and 1 for B [SEP].
        mask_positions: int32 [k], places to predict, ascending.
        mask_labels: int32 [k], the original ids there.
        pair_label: sop: 1 if A and B are swapped; nsp: 1 if B is of another document; -1 for "none".
    """

    tokens: np.ndarray
    types: np.ndarray
    mask_positions: np.ndarray
    mask_labels: np.ndarray
    pair_label: int


class PairDataset:
    """The samples of some documents of a corpus.

    Args:
        documents: Documents to use, (start, stop).
        seq_length: Longest sample in tokens, special tokens included.
        max_predictions: Most masked tokens in a sample.
        max_ngram: Longest masked span, in words.
        whole_word: Mask whole words; otherwise single pieces.
        short_sequence_probability: Share of samples made shorter on purpose.
        objective: What the second segment is for.
        filled: Whether single segments end where they are full, and not where a sentence does.
        cache_directory: Where to keep the sample index, shared by processes and runs; None: build it in memory.

    Raises:
        UserError: A setting out of range, or documents that give no sample.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: tuple[int, int],
        tokenizer: Tokenizer,
        *,
        seq_length: int,
        max_predictions: int,
        mask_probability: float = 0.15,
        max_ngram: int = 3,
        whole_word: bool = True,
        short_sequence_probability: float = 0.1,
        objective: Objective = "sop",
        filled: bool = False,
        seed: int,
        cache_directory: str | os.PathLike[str] | None = None,
    ) -> None:
        _check_settings(indexed, documents, seq_length, max_predictions, max_ngram, objective)
        _check_shares(mask_probability=mask_probability, short_sequence_probability=short_sequence_probability)
        self.indexed, self.documents, self.tokenizer = indexed, documents, tokenizer
        self.seq_length, self.max_predictions = seq_length, max_predictions
        self.mask_probability, self.max_ngram, self.whole_word = mask_probability, max_ngram, whole_word
        self.short_sequence_probability, self.objective, self.seed = short_sequence_probability, objective, seed
        self._filled = filled and objective == "none"
        self._margin = cut_margin(self._room, filled=self._filled)
        self._key = np.array([derive_key(seed), 0], dtype=np.uint64)
        self._special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._special[list(tokenizer.special_ids)] = True
        self._random_ids = np.flatnonzero(~self._special).astype(np.int32)
        self._index = self._load_index(Path(cache_directory) if cache_directory is not None else None)
        self._documents_of_samples = self._find_documents() if objective == "nsp" else None

    def __len__(self) -> int:
        """Samples in one epoch."""
        return len(self._index)

    def use(self) -> CorpusUse:
        """How much of the documents the samples of an epoch hold."""
        return corpus_use(self.indexed, self.documents, self._index)

    def sample(self, epoch: int, index: int) -> Sample:
        """Build one sample; the same arguments always give the same sample.

        Args:
            epoch: Number of the pass through the data, from 0; masks, cuts and swaps differ between epochs.
            index: Number of the sample, 0 <= index < len(self).

        Raises:
            UserError: The corpus holds a token id outside the vocabulary.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.indexed.prefix}")
        rng = self._generator(epoch, index)
        segments, pair_label = self._segments(index, rng)
        cls, sep = (np.array([token_id], dtype=np.int32) for token_id in (self.tokenizer.cls_id, self.tokenizer.sep_id))
        pieces, starts = [cls], [_ONE_WORD]
        for ids, word_starts in segments:
            pieces += [ids, sep]
            starts += [word_starts, _ONE_WORD]
        tokens = np.concatenate(pieces)
        types = np.zeros(len(tokens), dtype=np.int8)
        types[2 + len(segments[0].ids) :] = 1
        masked = mask_tokens(
            tokens,
            np.concatenate(starts),
            self._special[tokens],
            rng,
            mask_id=self.tokenizer.mask_id,
            random_ids=self._random_ids,
            max_predictions=self.max_predictions,
            mask_probability=self.mask_probability,
            max_ngram=self.max_ngram,
        )
        return Sample(masked.tokens, types, masked.positions, masked.labels, pair_label)

    def lengths(self, epoch: int, indices: np.ndarray) -> np.ndarray:
        """Tokens of the samples that `sample` builds, without building them: int64 [n].

        Args:
            epoch: Number of the pass through the data.
            indices: int [n], numbers of samples.
        """
        special = self.seq_length - self._room
        if self.objective == "nsp":  # the second segment is drawn, and any other sample's
            drawn = [self._segments(index, self._generator(epoch, index))[0] for index in indices.tolist()]
            return special + np.array([sum(len(segment.ids) for segment in segments) for segments in drawn])
        rows = self._index[indices]
        lengths = text_lengths(self.indexed, rows, self.tokenizer.word_starts, self._margin)
        return special + (lengths if self.objective == "none" else np.minimum(lengths, rows[:, 2]))

    def _generator(self, epoch: int, index: int) -> np.random.Generator:
        """The source of all choices of one sample."""
        return np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, index, epoch]))

    def _segments(self, index: int, rng: np.random.Generator) -> tuple[list["_Segment"], int]:
        """The one or two segments of a sample, two cut to its target length, and the pair label."""
        whole, borders = self._read(index)
        if self.objective == "none":
            return [whole], -1
        # Between two of its sentences, of which every sample has at least two.
        middle = int(borders[rng.integers(1, len(borders) - 1)])
        a, b = whole.cut(0, middle), whole.cut(middle, len(whole.ids))
        pair_label = int(rng.integers(2))
        if pair_label and self.objective == "sop":
            a, b = b, a
        elif pair_label:
            b = self._random_segment(index, rng)
        length_a, length_b = _truncated(len(a.ids), len(b.ids), int(self._index[index, 2]))
        return [_trim(a, length_a, rng), _trim(b, length_b, rng)], pair_label

    def _read(self, index: int) -> tuple["_Segment", np.ndarray]:
        """Tokens of a sample, and where each sentence (or piece of one) starts in them, then their number."""
        first, last, _, begin, end = self._index[index].tolist()
        sizes = self.indexed.sizes[first:last].astype(np.int64)
        sizes = sizes[sizes > 0]
        starts = np.cumsum(sizes) - sizes
        stop = int(starts[-1]) + end
        # Cuts inside a sentence move back to the start of a word, for which a little more is read on both sides.
        margin = self._margin
        low = max(0, begin - margin)
        stored = self.indexed.tokens(first, last)[low : stop + 1]
        if stored.min() < 0 or stored.max() >= self.tokenizer.vocab_size:
            self._refuse_ids(first, last)
        ids = stored.astype(np.int32)
        word_starts = self.tokenizer.word_starts[ids]
        sentence_starts = starts[starts >= low] - low
        word_starts[sentence_starts] = True
        begin, stop = (_word_start(word_starts, cut - low, margin) for cut in (begin, stop))
        inside = sentence_starts[sentence_starts > begin]
        if self.objective != "none" and sizes.max() > self._room:
            inside = self._with_pieces(inside, sizes, starts - low, begin, stop, word_starts)
        if not self.whole_word:
            word_starts = np.ones_like(word_starts)
        return _Segment(ids, word_starts).cut(begin, stop), np.concatenate([[begin], inside, [stop]]) - begin

    def _with_pieces(
        self, inside: np.ndarray, sizes: np.ndarray, starts: np.ndarray, begin: int, stop: int, word_starts: np.ndarray
    ) -> np.ndarray:
        """Places between `begin` and `stop` where sentences start, and those where pieces of long ones do."""
        cuts = [
            _word_start(word_starts, cut, self._margin)
            for k in np.flatnonzero(sizes > self._room)
            for cut in (starts[k] + piece_starts(int(sizes[k]), self._room)).tolist()
            if begin < cut < stop
        ]
        return np.unique([*inside.tolist(), *(cut for cut in cuts if cut > begin)]).astype(np.int64)

    def _random_segment(self, index: int, rng: np.random.Generator) -> "_Segment":
        """Consecutive sentences from some sample of another document."""
        owners = self._documents_of_samples
        assert owners is not None
        begin, end = (int(np.searchsorted(owners, owners[index], side=side)) for side in ("left", "right"))
        other = int(rng.integers(len(self) - (end - begin)))
        other += (end - begin) * (other >= begin)
        whole, borders = self._read(other)
        return whole.cut(int(borders[rng.integers(len(borders) - 1)]), len(whole.ids))

    def _refuse_ids(self, first: int, last: int) -> None:
        vocab_size, itemsize = self.tokenizer.vocab_size, self.indexed.dtype.itemsize
        for sentence in range(first, last):
            ids = self.indexed[sentence].astype(np.int64)
            wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
            if wrong.size:
                byte = int(self.indexed.offsets[sentence]) + int(wrong[0]) * itemsize
                raise UserError(
                    f"{self.indexed.tokens_path} byte {byte} (sentence {sentence}) holds token id {ids[wrong[0]]} but "
                    f"the vocabulary has {vocab_size} entries: use the tokenizer the corpus was preprocessed with."
                )

    def _load_index(self, cache_directory: Path | None) -> np.ndarray:
        """The sample index, from the cache if it is there."""
        path = None
        if cache_directory is not None:
            path = cache_directory / f"{Path(self.indexed.prefix).name}_samples_{self._index_key()}.npy"
        if path is not None and path.is_file():
            try:
                return _opened_index(path)
            except (ValueError, OSError, EOFError):
                path.unlink(missing_ok=True)  # cut short by a full disk or a crash: build it again
        index = build_samples(
            self.indexed.sizes,
            self.indexed.document_indices,
            self.documents,
            max_tokens=self._room,
            short_sequence_probability=self.short_sequence_probability,
            pairs=self.objective != "none",
            seed=self.seed,
            filled=self._filled,
        )
        if len(index) == 0:
            needs = "tokens" if self.objective == "none" else f"two sentences for pair_objective {self.objective}"
            raise UserError(
                f"Documents {self.documents[0]} to {self.documents[1]} of {self.indexed.prefix} give no sample: "
                f"a document needs {needs}; check the split and the corpus."
            )
        if path is None:
            return index
        with reporting("written", path, "set data.cache_dir to a directory with room that you may write to"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path, "wb") as file:  # numpy itself does not say why it cannot write
                np.lib.format.write_array_header_2_0(file, np.lib.format.header_data_from_array_1_0(index))
                file.write(np.ascontiguousarray(index).data)
        return _opened_index(path)

    @property
    def _room(self) -> int:
        """Tokens a sample holds beside the special ones."""
        return self.seq_length - (2 if self.objective == "none" else 3)

    def _index_key(self) -> str:
        """Hash of everything the sample index depends on."""
        parts = (
            INDEX_VERSION,
            self.indexed.fingerprint(),
            self.documents,
            self._room,
            self.short_sequence_probability,
            self.objective != "none",
            self.seed,
            *(("filled",) if self._filled else ()),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _find_documents(self) -> np.ndarray:
        """Document of each sample, int64 [N] ascending."""
        owners = np.searchsorted(np.array(self.indexed.document_indices), self._index[:, 0], side="right") - 1
        if owners[0] == owners[-1]:
            raise UserError(
                f"{self.indexed.prefix} gives samples from one document only: objective nsp needs a second "
                f"document, use sop."
            )
        return owners


_ONE_WORD = np.ones(1, dtype=bool)


def _opened_index(path: Path) -> np.ndarray:
    """A sample index in a file, unread.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    index = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(index, np.ndarray) or index.shape[1:] != (COLUMNS,) or index.dtype.kind != "i":
        raise ValueError("no sample index")
    return np.asarray(index)


class _Segment(NamedTuple):
    """Tokens with their word starts: ids int32 [n], word_starts bool [n]."""

    ids: np.ndarray
    word_starts: np.ndarray

    def cut(self, begin: int, end: int) -> "_Segment":
        return _Segment(self.ids[begin:end], self.word_starts[begin:end])


def _word_start(word_starts: np.ndarray, place: int, margin: int) -> int:
    """The last start of a word at most `margin` tokens before a place, or the place itself."""
    if place < len(word_starts):
        for start in range(place, max(0, place - margin) - 1, -1):
            if word_starts[start]:
                return start
    return place


def _truncated(length_a: int, length_b: int, total: int) -> tuple[int, int]:
    """Lengths after taking tokens from the longer segment, one at a time, until both fit `total`."""
    half = total // 2
    if length_a + length_b <= total:
        return length_a, length_b
    if length_b <= half:
        return total - length_b, length_b
    if length_a <= total - half:
        return length_a, total - length_a
    return total - half, half


def _trim(segment: _Segment, length: int, rng: np.random.Generator) -> _Segment:
    """Shorten a segment; a fair coin says for each lost token whether it goes from the front or the back."""
    surplus = len(segment.ids) - length
    if surplus <= 0:
        return segment
    front = int(rng.binomial(surplus, 0.5))
    return segment.cut(front, front + length)


def _check_settings(
    indexed: IndexedDataset,
    documents: tuple[int, int],
    seq_length: int,
    max_predictions: int,
    max_ngram: int,
    objective: str,
) -> None:
    count = len(indexed.document_indices) - 1
    if not 0 <= documents[0] <= documents[1] <= count:
        raise UserError(
            f"Documents {documents[0]} to {documents[1]} were asked of {indexed.prefix}, which has {count}."
        )
    if indexed.dtype.kind not in "iu":
        raise UserError(f"{indexed.tokens_path} holds {indexed.dtype} values: token ids must be integers.")
    if seq_length < 5:
        raise UserError(f"seq_length {seq_length} is too short: [CLS] A [SEP] B [SEP] needs at least 5 tokens.")
    if max_predictions < 1 or max_ngram < 1:
        raise UserError(f"max_predictions {max_predictions} and max_ngram {max_ngram} must be at least 1.")
    if objective not in ("sop", "nsp", "none"):
        raise UserError(f'Objective "{objective}" is unknown: choose sop, nsp or none.')


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise UserError(f"{name} {share} must lie between 0 and 1.")
