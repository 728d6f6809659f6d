from __future__ import annotations

import time

import numpy as np
import pytest

from megatron_bert.data import sample_index
from megatron_bert.data.hashing import derive_key, keyed_hash
from megatron_bert.data.sample_index import build_samples, split_documents
from parallel.errors import UserError


def plain_samples(
    sizes: list[int],
    bounds: list[int],
    documents: tuple[int, int],
    max_tokens: int,
    short: float,
    minimum: int,
    seed: int,
) -> list[list[int]]:
    """The rules as a plain loop over sentences."""

    def target_at(first: int) -> int:
        if keyed_hash(derive_key(seed, 0), first) / 2**64 < short:
            return 2 + keyed_hash(derive_key(seed, 1), first) % (max_tokens - 1)
        return max_tokens

    samples = []
    for document in range(*documents):
        sentences = [place for place in range(bounds[document], bounds[document + 1]) if sizes[place] > 0]
        if len(sentences) < max(1, minimum) or max(sizes[place] for place in sentences) > 512:
            continue
        first, length, count, target = sentences[0], 0, 0, target_at(sentences[0])
        for number, place in enumerate(sentences):
            length, count, remaining = length + sizes[place], count + 1, len(sentences) - number - 1
            if remaining == 0 or (length >= target and count >= minimum and remaining > 1):
                samples.append([first, place + 1, target])
                if remaining:
                    first, length, count = sentences[number + 1], 0, 0
                    target = target_at(first)
    return samples


def random_layout(seed: int, documents: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Documents of 0 to 60 sentences, some sentences empty, a few beyond the limit."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 12, size=documents) * rng.integers(1, 6, size=documents)
    sizes = rng.geometric(0.05, size=counts.sum()) * (rng.random(counts.sum()) > 0.05)
    sizes[rng.random(len(sizes)) < 0.003] = 513
    return sizes.astype(np.int32), np.concatenate([[0], np.cumsum(counts)])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("minimum", [1, 2])
@pytest.mark.parametrize(("max_tokens", "short"), [(2, 0.0), (30, 0.1), (125, 0.0), (125, 1.0), (100000, 0.5)])
def test_samples_equal_those_of_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, seed: int, minimum: int, max_tokens: int, short: float
) -> None:
    sizes, bounds = random_layout(seed)
    monkeypatch.setattr(sample_index, "CHUNK_SENTENCES", 50)
    for documents in ((0, 60), (7, 31), (5, 5)):
        samples = build_samples(
            sizes,
            bounds,
            documents,
            max_tokens=max_tokens,
            short_sequence_probability=short,
            minimum_sentences=minimum,
            seed=seed,
        )
        assert samples.dtype == np.int32
        assert samples.shape[1] == 3
        assert samples.tolist() == plain_samples(
            sizes.tolist(), bounds.tolist(), documents, max_tokens, short, minimum, seed
        )


def build(sizes: list[int], bounds: list[int], **changes: float) -> list[list[int]]:
    settings = {"max_tokens": 10, "short_sequence_probability": 0.0, "minimum_sentences": 2, "seed": 1, **changes}
    documents = (0, len(bounds) - 1)
    return build_samples(np.array(sizes, dtype=np.int32), np.array(bounds), documents, **settings).tolist()  # type: ignore[arg-type]


def test_the_rules_by_hand() -> None:
    assert build([6, 6, 6, 6, 6], [0, 5]) == [[0, 2, 10], [2, 5, 10]], "the last sentence is not left alone"
    assert build([12, 1, 12, 1], [0, 4]) == [[0, 2, 10], [2, 4, 10]], "a pair has two sentences, however long"
    assert build([12, 1, 12, 1], [0, 4], minimum_sentences=1) == [[0, 1, 10], [1, 4, 10]]
    assert build([5, 4, 4], [0, 1, 3]) == [[1, 3, 10]], "one-sentence documents give no pairs"
    assert build([5, 4, 4], [0, 1, 3], minimum_sentences=1) == [[0, 1, 10], [1, 3, 10]]
    assert build([5, 600, 4, 4], [0, 2, 4]) == [[2, 4, 10]], "documents with a long sentence are dropped"
    assert build([5, 600, 4, 4], [0, 2, 4], long_sentence=600) == [[0, 2, 10], [2, 4, 10]]
    assert build([0, 5, 0, 0, 5, 0], [0, 0, 6]) == [[1, 5, 10]], "empty sentences do not count"
    assert build([0, 5, 0], [0, 3]) == []


def test_short_targets_are_as_frequent_and_as_long_as_asked() -> None:
    sizes, bounds = np.full(200_000, 5, dtype=np.int32), np.arange(0, 200_001, 2)
    targets = build_samples(
        sizes, bounds, (0, 100_000), max_tokens=125, short_sequence_probability=0.1, minimum_sentences=2, seed=3
    )[:, 2]
    short = targets[targets < 125]
    assert abs(len(short) / len(targets) - 0.1 * 123 / 124) < 0.005
    assert (short.min(), short.max()) == (2, 124)
    assert abs(short.mean() - 63) < 2


def test_one_long_document_is_fast() -> None:
    sizes = np.random.default_rng(0).geometric(1 / 22, size=200_000).astype(np.int32)
    started = time.perf_counter()
    samples = build_samples(
        sizes,
        np.array([0, len(sizes)]),
        (0, 1),
        max_tokens=509,
        short_sequence_probability=0.1,
        minimum_sentences=2,
        seed=1,
    )
    assert time.perf_counter() - started < 5
    assert samples[0, 0] == 0
    assert samples[-1, 1] == len(sizes)
    assert np.array_equal(samples[1:, 0], samples[:-1, 1])


@pytest.mark.parametrize(
    ("weights", "documents", "borders"),
    [
        ("969,30,1", 1000, (969, 999, 1000)),
        ("949, 50, 1", 1737, (1648, 1735, 1737)),
        ("1", 10, (10, 10, 10)),
        ("0.5,0.5", 7, (3, 7, 7)),
        ("1,1,1", 5, (1, 3, 5)),
        ("0,0,1", 3, (0, 0, 3)),
        ("969,30,1", 0, (0, 0, 0)),
    ],
)
def test_splits_round_as_megatron_does(weights: str, documents: int, borders: tuple[int, int, int]) -> None:
    train, valid, test = borders
    assert split_documents(weights, documents) == ((0, train), (train, valid), (valid, test))


@pytest.mark.parametrize("weights", ["", "a,b", "1,2,3,4", "0,0", "-1,2", "nan,1", "inf", "1,,2"])
def test_bad_splits_are_refused(weights: str) -> None:
    with pytest.raises(UserError, match="Split"):
        split_documents(weights, 10)
