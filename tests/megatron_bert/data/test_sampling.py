# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_bert.data.hashing import derive_key, keyed_hash, mix64
from megatron_bert.data.sampling import BLEND_BLOCK, Blend, BlendedCorpus, permuted
from parallel.errors import UserError


def test_hashes_of_integers_and_arrays_agree() -> None:
    words = [0, 1, 2, 2**63, 2**64 - 1]
    array = np.array(words, dtype=np.uint64)
    assert mix64(array).tolist() == [mix64(word) for word in words]
    assert keyed_hash(7, array).tolist() == [keyed_hash(7, word) for word in words]
    assert mix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # first output of SplitMix64 seeded with 0
    assert derive_key(1, 2) != derive_key(2, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 64, 97, 1000, 4096, 4097, 10007])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_shuffling_is_a_bijection(size: int, key: int) -> None:
    found = permuted(np.arange(size), size, key)
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(size))


def test_one_position_equals_that_of_all_and_huge_sizes_work() -> None:
    everything = permuted(np.arange(1009), 1009, 5)
    assert [permuted(place, 1009, 5) for place in range(1009)] == everything.tolist()
    assert np.array_equal(permuted(np.arange(6).reshape(2, 3), 1009, 5), everything[:6].reshape(2, 3))
    assert 0 <= permuted(10**14, 10**15, 5) < 10**15


def test_orders_look_random() -> None:
    size = 2000
    orders = np.stack([permuted(np.arange(size), size, key) for key in range(200)])
    assert abs(np.corrcoef(orders[0], np.arange(size))[0, 1]) < 0.1
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.1
    # The element at one place is uniform over keys: its mean has standard error size / sqrt(12 * 200).
    assert abs(orders[:, 0].mean() - size / 2) < 5 * size / np.sqrt(12 * 200)
    # Small sizes reach every order.
    assert len({tuple(permuted(np.arange(3), 3, key)) for key in range(200)}) == 6


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [5, 1, 1], [0.001, 0.999], [1 / 3] * 3, [2.0**-15, 1.0]])
def test_blending_counts_draws_and_follows_the_weights(weights: list[float]) -> None:
    draws = np.arange(2 * BLEND_BLOCK + 1000)
    owners, earlier = Blend(weights).locate(draws)
    shares = np.array(weights) / sum(weights)
    for dataset, share in enumerate(shares):
        mine = owners == dataset
        assert np.array_equal(earlier[mine], np.arange(mine.sum()))
        behind = np.cumsum(mine) - share * (draws + 1)
        assert np.abs(behind).max() <= len(weights) + 2, "every prefix follows the weights"
        assert abs(mine[:BLEND_BLOCK].sum() - share * BLEND_BLOCK) < 1
    assert Blend(weights).counts(len(draws)).tolist() == np.bincount(owners, minlength=len(weights)).tolist()
    some = np.array([0, 5, BLEND_BLOCK + 3])
    assert [tuple(map(int, Blend(weights).locate(int(draw)))) for draw in some] == list(
        zip(owners[some], earlier[some])
    )


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1, 1e-9]])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(UserError, match=r"[Ww]eight"):
        Blend(weights)


class Numbers:
    """Stands for a data set: a sample is its own name."""

    def __init__(self, name: str, length: int) -> None:
        self.name, self.length = name, length

    def __len__(self) -> int:
        return self.length

    def sample(self, epoch: int, index: int) -> SimpleNamespace:
        return SimpleNamespace(name=self.name, epoch=epoch, index=index)


def test_every_epoch_reads_a_dataset_once_in_a_new_order() -> None:
    corpus = BlendedCorpus([Numbers("a", 30), Numbers("b", 7)], [2, 1], seed=3)  # type: ignore[list-item]
    owners, epochs, indices = corpus.locate(np.arange(300))
    seen = Counter(zip(owners.tolist(), epochs.tolist(), indices.tolist()))
    assert set(seen.values()) == {1}
    for owner, length in ((0, 30), (1, 7)):
        orders = [indices[(owners == owner) & (epochs == epoch)] for epoch in range(3)]
        assert all(sorted(order) == list(range(length)) for order in orders)
        assert not np.array_equal(orders[0], orders[1])


def test_the_stream_has_random_access() -> None:
    corpus = BlendedCorpus([Numbers("a", 30), Numbers("b", 7)], [2, 1], seed=3)  # type: ignore[list-item]
    owners, epochs, indices = corpus.locate(np.arange(300))
    for place in (0, 1, 150, 299):
        found: SimpleNamespace = corpus.sample(place)  # type: ignore[assignment]
        assert (found.name, found.epoch, found.index) == ("ab"[owners[place]], epochs[place], indices[place])
    assert [part.tolist() for part in corpus.locate(np.array([299, 0]))] == [
        part[[299, 0]].tolist() for part in (owners, epochs, indices)
    ]
    other = BlendedCorpus(corpus.datasets, [2, 1], seed=4).locate(np.arange(300))
    assert not np.array_equal(other[2], indices)
    with pytest.raises(UserError, match="1 blending weights were given for 2"):
        BlendedCorpus(corpus.datasets, [1], seed=0)
