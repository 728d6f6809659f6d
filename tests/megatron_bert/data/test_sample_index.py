# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_bert.data import sample_index
from megatron_bert.data.hashing import derive_key, keyed_hash
from megatron_bert.data.sample_index import build_samples, cut_margin, piece_starts, split_documents
from parallel.errors import UserError


def target_at(sentence: int, offset: int, max_tokens: int, short: float, seed: int) -> int:
    place = sentence ^ offset << 40
    if keyed_hash(derive_key(seed, 0), place) / 2**64 < short:
        return 2 + keyed_hash(derive_key(seed, 1), place) % (max_tokens - 1)
    return max_tokens


def plain_pairs(sentences: list[tuple[int, int]], max_tokens: int, short: float, seed: int) -> list[list[int]]:
    """The rules for the (number, size) of a document's sentences as a plain loop."""
    pieces = []
    for place, size in sentences:
        starts = [*piece_starts(size, max_tokens).tolist(), size]
        pieces += [(place, start, end) for start, end in itertools.pairwise(starts)]
    samples: list[list[int]] = []
    held: list[tuple[int, int, int]] = []
    for number, piece in enumerate(pieces):
        held.append(piece)
        remaining, length = len(pieces) - number - 1, sum(end - start for _, start, end in held)
        target = target_at(held[0][0], held[0][1], max_tokens, short, seed)
        if remaining == 0 or (length >= target and len(held) >= 2 and remaining > 1):
            samples.append([held[0][0], piece[0] + 1, target, held[0][1], piece[2]])
            held = []
    return samples if len(pieces) > 1 else []


def plain_single(sentences: list[tuple[int, int]], max_tokens: int, short: float, seed: int) -> list[list[int]]:
    margin = cut_margin(max_tokens)
    most = max_tokens - margin
    samples = []
    number = offset = 0
    while number < len(sentences):
        start, first, begin = number, sentences[number][0], offset
        target = target_at(first, begin, max_tokens, short, seed)
        room = min(target, most) if begin else target
        left = sentences[number][1] - offset
        if left > room:
            even = math.ceil(left / math.ceil(left / most))
            offset += min(max(margin + 1, min(target, most)), even)
            last, end = number, offset
            if offset == sentences[number][1]:
                number, offset = number + 1, 0
        else:
            while number < len(sentences) and left <= room:
                room -= left
                last, end = number, sentences[number][1]
                number, offset = number + 1, 0
                left = sentences[number][1] if number < len(sentences) else 0
        length = sum(size for _, size in sentences[start : last + 1]) - begin - sentences[last][1] + end
        samples.append([first, sentences[last][0] + 1, length, begin, end])
    return samples


def plain_samples(
    sizes: list[int], bounds: list[int], documents: tuple[int, int], pairs: bool, *how: float
) -> list[list[int]]:
    samples = []
    for document in range(*documents):
        places = range(bounds[document], bounds[document + 1])
        sentences = [(place, sizes[place]) for place in places if sizes[place] > 0]
        samples += (plain_pairs if pairs else plain_single)(sentences, *how)  # type: ignore[arg-type]
    return samples


def random_layout(seed: int, documents: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Documents of 0 to 60 sentences, some sentences empty, a few very long."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 12, size=documents) * rng.integers(1, 6, size=documents)
    sizes = rng.geometric(0.05, size=counts.sum()) * (rng.random(counts.sum()) > 0.05)
    sizes[rng.random(len(sizes)) < 0.003] = 1513
    return sizes.astype(np.int32), np.concatenate([[0], np.cumsum(counts)])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("max_tokens", "short"), [(2, 0.0), (30, 0.1), (125, 0.0), (125, 1.0), (100000, 0.5)])
def test_samples_equal_those_of_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, seed: int, pairs: bool, max_tokens: int, short: float
) -> None:
    count = 12 if max_tokens == 2 else 60  # documents; the shortest samples are the most
    sizes, bounds = random_layout(seed, count)
    monkeypatch.setattr(sample_index, "CHUNK_SENTENCES", 50)
    for documents in ((0, count), (count // 8, count // 2), (5, 5)):
        samples = build_samples(
            sizes,
            bounds,
            documents,
            max_tokens=max_tokens,
            short_sequence_probability=short,
            pairs=pairs,
            seed=seed,
        )
        assert samples.dtype == np.int32
        assert samples.shape[1] == 5
        assert samples.tolist() == plain_samples(
            sizes.tolist(), bounds.tolist(), documents, pairs, max_tokens, short, seed
        )


def build(sizes: list[int], bounds: list[int], **changes: float) -> list[list[int]]:
    settings = {"max_tokens": 10, "short_sequence_probability": 0.0, "pairs": True, "seed": 1, **changes}
    documents = (0, len(bounds) - 1)
    return build_samples(np.array(sizes, dtype=np.int32), np.array(bounds), documents, **settings).tolist()  # type: ignore[arg-type]


def test_the_rules_of_pairs_by_hand() -> None:
    assert build([6, 6, 6, 6, 6], [0, 5]) == [[0, 2, 10, 0, 6], [2, 5, 10, 0, 6]], "the last sentence is not left alone"
    assert build([10, 1, 10, 1], [0, 4]) == [[0, 2, 10, 0, 1], [2, 4, 10, 0, 1]], "a pair has two sentences"
    assert build([5, 4, 4], [0, 1, 3]) == [[1, 3, 10, 0, 4]], "one-sentence documents give no pairs"
    assert build([0, 5, 0, 0, 5, 0], [0, 0, 6]) == [[1, 5, 10, 0, 5]], "empty sentences do not count"
    assert build([0, 5, 0], [0, 3]) == []


def test_a_sentence_longer_than_a_sample_counts_as_several() -> None:
    assert piece_starts(10, 10).tolist() == [0]
    assert piece_starts(11, 10).tolist() == [0, 5]
    assert piece_starts(1000, 509).tolist() == [0, 500]
    assert build([11], [0, 1]) == [[0, 1, 10, 0, 11]], "a document of one long sentence gives pairs"
    assert build([40], [0, 1]) == [[0, 1, 10, 0, 16], [0, 1, 10, 16, 40]]
    assert build([5, 600, 4, 4], [0, 2, 4])[-1] == [2, 4, 10, 0, 4]
    assert build([5, 11, 4], [0, 3]) == [[0, 2, 10, 0, 5], [1, 3, 10, 5, 4]]


def test_the_rules_of_single_segments_by_hand() -> None:
    assert build([6, 4, 6, 6], [0, 4], pairs=False) == [[0, 2, 10, 0, 4], [2, 3, 6, 0, 6], [3, 4, 6, 0, 6]]
    assert build([25, 2], [0, 2], pairs=False) == [
        [0, 1, 9, 0, 9],
        [0, 1, 8, 9, 17],
        [0, 1, 8, 17, 25],
        [1, 2, 2, 0, 2],
    ]
    assert build([5, 4, 4], [0, 1, 3], pairs=False) == [[0, 1, 5, 0, 5], [1, 3, 8, 0, 4]]
    assert build([0, 5, 0], [0, 3], pairs=False) == [[1, 2, 5, 0, 5]]


def test_short_targets_are_as_frequent_and_as_long_as_asked() -> None:
    sizes, bounds = np.full(200_000, 5, dtype=np.int32), np.arange(0, 200_001, 2)
    targets = build_samples(
        sizes, bounds, (0, 100_000), max_tokens=125, short_sequence_probability=0.1, pairs=True, seed=3
    )[:, 2]
    short = targets[targets < 125]
    assert abs(len(short) / len(targets) - 0.1 * 123 / 124) < 0.005
    assert (short.min(), short.max()) == (2, 124)
    assert abs(short.mean() - 63) < 2


@pytest.mark.timeout(60)  # work that grows with the square of its length would take many minutes
def test_one_long_document_is_fast() -> None:
    sizes = np.random.default_rng(0).geometric(1 / 22, size=200_000).astype(np.int32)
    samples = build_samples(
        sizes,
        np.array([0, len(sizes)]),
        (0, 1),
        max_tokens=509,
        short_sequence_probability=0.1,
        pairs=True,
        seed=1,
    )
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
