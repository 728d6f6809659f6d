# SPDX-License-Identifier: Apache-2.0
"""The order of training samples: shuffling and blending with random access and constant memory.

Both are functions from a position to a sample, never lists: the g-th sample of a run costs the same for g = 0 and for
g = 10**12, so resuming needs one counter and every rank can look at any part of the stream.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_bert.data.hashing import MASK64, Words, derive_key, mix64
from parallel.errors import UserError

if TYPE_CHECKING:
    from megatron_bert.data.sentence_pairs import PairDataset, Sample

FEISTEL_ROUNDS = 6
BLEND_BLOCK = 1 << 16
"""Draws after which the blending pattern repeats; a weight is honored to one part in this many."""


def permuted(index: Any, size: int, key: int) -> Any:
    """Give the element at a position of a pseudo-random permutation of `range(size)`.

    A Feistel network permutes the smallest power of four that holds `size`; results outside the range are permuted
    again until they fall inside ("cycle walking"), which keeps the map a bijection (Black and Rogaway 2002).

    Args:
        index: Position in [0, size): an integer, or an integer array of any shape.
        size: Number of elements, at least 1.
        key: 64-bit key; each key gives its own permutation.

    Returns:
        The permuted index: an integer, or an int64 array of the shape of `index`.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    round_keys = [derive_key(key, number) for number in range(FEISTEL_ROUNDS)]
    if isinstance(index, int | np.integer):
        value = _feistel(int(index), half_bits, round_keys)
        while value >= size:
            value = _feistel(value, half_bits, round_keys)
        return value
    shape = np.shape(index)
    values = _feistel(np.asarray(index, dtype=np.uint64).reshape(-1), half_bits, round_keys)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _feistel(values[outside], half_bits, round_keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64).reshape(shape)


def _feistel(words: Words, half_bits: int, round_keys: Sequence[int]) -> Words:
    """Permute [0, 4**half_bits)."""
    mask = (1 << half_bits) - 1
    left, right = words >> half_bits, words & mask
    for round_key in round_keys:
        left, right = right, left ^ (mix64((right + round_key) & MASK64) & mask)
    return (left << half_bits) | right


@dataclass(frozen=True, kw_only=True)
class BatchShare:
    """Which samples of the training stream a data rank works on, micro batch by micro batch.

    Micro batch k of a step holds samples ``(k * data + rank) * M`` and the M - 1 that follow of the step's G, for a
    global batch of G and a micro batch of M: the samples of a step are the same at every data and micro batch size.

    Attributes:
        global_batch: G, a multiple of ``micro_batch * data_size``.
        micro_batch: M.
        data_rank, data_size: Place on the data axis.
        first_sample: Number in the stream of the first sample of step 0.
    """

    global_batch: int
    micro_batch: int
    data_rank: int = 0
    data_size: int = 1
    first_sample: int = 0

    @property
    def micro_batches_per_step(self) -> int:
        """Gradient accumulation: micro batches of a step on each data rank."""
        return self.global_batch // (self.micro_batch * self.data_size)

    def samples(self, index: int) -> range:
        """Give the numbers in the stream of the samples in micro batch `index`, counted from step 0."""
        step, k = divmod(index, self.micro_batches_per_step)
        start = self.first_sample + step * self.global_batch + (k * self.data_size + self.data_rank) * self.micro_batch
        return range(start, start + self.micro_batch)


class Blend:
    """Deals an endless stream of draws to several datasets in fixed proportions.

    One block of `BLEND_BLOCK` draws is laid out once: every dataset gets its share of the block (largest remainders) at
    evenly spaced places. The stream repeats that block, so any prefix of it follows the weights closely and the place
    of a draw is arithmetic.

    Args:
        weights: One positive number a dataset; only their ratios matter.

    Raises:
        UserError: No weights, a weight that is not a positive finite number, or one too small to get a draw a block.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise UserError(f"Blending weights {list(weights)} must be positive numbers, one a dataset.")
        quota = np.asarray(weights, dtype=np.float64) / math.fsum(weights) * BLEND_BLOCK
        if quota.min() < 1:
            raise UserError(
                f"Blending weight {weights[int(quota.argmin())]} is less than 1/{BLEND_BLOCK} of the total "
                f"{math.fsum(weights)}: raise it or leave that dataset out."
            )
        counts = np.floor(quota).astype(np.int64)
        largest_remainders = np.argsort(counts - quota, kind="stable")[: BLEND_BLOCK - int(counts.sum())]
        counts[largest_remainders] += 1
        owners = np.repeat(np.arange(len(counts)), counts)
        ranks = np.concatenate([np.arange(count) for count in counts])
        layout = np.argsort((ranks + 0.5) / counts[owners], kind="stable")
        self._owners, self._ranks, self._counts = owners[layout], ranks[layout], counts

    def counts(self, draws: int) -> np.ndarray:
        """How many of the first `draws` draws go to each dataset, int64 [datasets]."""
        blocks, rest = divmod(draws, BLEND_BLOCK)
        return blocks * self._counts + np.bincount(self._owners[:rest], minlength=len(self._counts))

    def locate(self, draws: Any) -> tuple[Any, Any]:
        """Which dataset each draw goes to, and how many earlier draws went to it: int64, of the shape of `draws`.

        Args:
            draws: Numbers of draws from 0: an integer or an integer array.
        """
        block, place = divmod(draws, BLEND_BLOCK)
        owner = self._owners[place]
        return owner, block * self._counts[owner] + self._ranks[place]


class BlendedCorpus:
    """The infinite training stream over one or more datasets.

    Every dataset is read through in a new order each epoch; an epoch of a dataset ends when all its samples were drawn.
    The stream depends on the seed, the weights and the lengths of the datasets alone.

    Args:
        datasets: The datasets; each has `len()` samples in an epoch and `sample(epoch, index)`.
        weights: Their shares of the stream, any positive scale.
    """

    def __init__(self, datasets: Sequence["PairDataset"], weights: Sequence[float], seed: int) -> None:
        if len(datasets) != len(weights):
            raise UserError(f"{len(weights)} blending weights were given for {len(datasets)} datasets: give one each.")
        self.datasets = list(datasets)
        self.seed = seed
        self._lengths = [len(dataset) for dataset in datasets]
        self._blend = Blend(weights)

    def locate(self, global_samples: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Dataset, epoch and index in the dataset of samples of the stream: int64 arrays [N].

        Args:
            global_samples: int64 array [N] of positions in the stream, from 0.
        """
        owners, draws = self._blend.locate(np.asarray(global_samples, dtype=np.int64).reshape(-1))
        lengths = np.asarray(self._lengths, dtype=np.int64)[owners]
        epochs, indices = draws // lengths, draws % lengths
        for owner, epoch, here in _by_epoch(owners, epochs):
            indices[here] = permuted(indices[here], self._lengths[owner], self._key(owner, epoch))
        return owners, epochs, indices

    def epochs(self, samples: int) -> list[float]:
        """How often the first `samples` samples of the stream go through each dataset."""
        return (self._blend.counts(samples) / np.array(self._lengths)).tolist()

    def sample(self, global_sample: int) -> "Sample":
        """Build the sample at one position of the stream."""
        owner, draws = (int(number) for number in self._blend.locate(int(global_sample)))
        epoch, place = divmod(draws, self._lengths[owner])
        index = permuted(place, self._lengths[owner], self._key(owner, epoch))
        return self.datasets[owner].sample(epoch, index)

    def lengths(self, global_samples: np.ndarray) -> np.ndarray:
        """Tokens of the samples at positions of the stream, without building them: int64 [N]."""
        owners, epochs, indices = self.locate(global_samples)
        lengths = np.empty_like(owners)
        for owner, epoch, here in _by_epoch(owners, epochs):
            lengths[here] = self.datasets[owner].lengths(epoch, indices[here])
        return lengths

    def _key(self, owner: int, epoch: int) -> int:
        return derive_key(self.seed, owner, epoch)


def _by_epoch(owners: np.ndarray, epochs: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Each dataset and epoch that samples are of, and which of the samples those are: bool [N]."""
    for owner, epoch in np.unique(np.stack([owners, epochs], axis=1), axis=0).tolist():
        yield owner, epoch, (owners == owner) & (epochs == epoch)
