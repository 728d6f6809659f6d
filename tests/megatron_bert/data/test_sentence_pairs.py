# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bert.data.indexed import IndexedDataset
from megatron_bert.data.sentence_pairs import PairDataset, Sample
from parallel.errors import UserError

from .support import numbered_tokenizer, random_corpus, write_corpus

PAD, UNK, CLS, SEP, MASK = range(5)


def pairs(folder: Path, indexed: IndexedDataset, **changes: Any) -> PairDataset:
    settings: dict[str, Any] = {"seq_length": 48, "max_predictions": 8, "seed": 11, **changes}
    documents = settings.pop("documents", (0, len(indexed.document_indices) - 1))
    return PairDataset(indexed, documents, numbered_tokenizer(folder), **settings)


def unmasked(sample: Sample) -> list[int]:
    tokens = sample.tokens.copy()
    tokens[sample.mask_positions] = sample.mask_labels
    return tokens.tolist()


def segments(sample: Sample) -> tuple[list[int], list[int]]:
    """A and B before masking; checks the frame around them."""
    tokens = unmasked(sample)
    separators = [place for place, token in enumerate(tokens) if token == SEP]
    assert tokens[0] == CLS
    assert len(separators) == 2
    assert separators[1] == len(tokens) - 1
    assert sample.types.tolist() == [0] * (separators[0] + 1) + [1] * (len(tokens) - separators[0] - 1)
    return tokens[1 : separators[0]], tokens[separators[0] + 1 : -1]


def contains(whole: list[int], part: list[int]) -> bool:
    return any(whole[start : start + len(part)] == part for start in range(len(whole) - len(part) + 1))


def same(a: Sample, b: Sample) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("objective", ["sop", "nsp"])
def test_pairs_are_two_framed_segments_of_their_sources(tmp_path: Path, objective: str) -> None:
    corpus = random_corpus(tmp_path / "x", 0, 40)
    dataset = pairs(tmp_path, corpus, objective=objective)
    documents = [
        corpus.tokens(first, last).tolist() for first, last in zip(corpus.document_indices, corpus.document_indices[1:])
    ]
    labels = []
    for index in range(len(dataset)):
        sample = dataset.sample(0, index)
        a, b = segments(sample)
        first, last, target, *_ = dataset._index[index]
        source = dataset._read(index)[0].ids.tolist()
        assert contains(corpus.tokens(first, last).tolist(), source)
        owner = int(np.searchsorted(corpus.document_indices, first, side="right")) - 1
        assert len(sample.tokens) <= min(48, target + 3)
        assert a
        assert b
        assert 1 <= len(sample.mask_positions) <= 8
        assert len(sample.mask_labels) == len(sample.mask_positions)
        assert (sample.tokens.dtype, sample.types.dtype) == (np.int32, np.int8)
        labels.append(sample.pair_label)
        if sample.pair_label == 0:
            assert contains(source, a)
            assert contains(source, b)
            assert len(a) + len(b) == min(len(source), target)
        elif objective == "sop":
            assert contains(source, a)
            assert contains(source, b)
        else:
            others = [document for number, document in enumerate(documents) if number != owner]
            assert contains(source, a)
            assert any(contains(document, b) for document in others)
    assert 0.35 < np.mean(labels) < 0.65


def test_the_order_label_tells_the_order(tmp_path: Path) -> None:
    # Ids rise through the document, so the order of the segments shows; nothing is truncated.
    corpus = write_corpus(tmp_path / "x", [[[10, 11], [12], [13, 14, 15], [16]], [[20], [21, 22]]])
    dataset = pairs(tmp_path, corpus, short_sequence_probability=0.0)
    middles = set()
    for epoch in range(40):
        sample = dataset.sample(epoch, 0)
        a, b = segments(sample)
        assert (a[0] > b[0]) == bool(sample.pair_label)
        assert sorted(a + b) == list(range(10, 17))
        middles.add(max(a[0], b[0]))
    assert middles == {12, 13, 16}, "cut between any two sentences"


def test_the_random_segment_comes_from_every_other_document(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "x", [[[10], [11]], [[20], [21]], [[30], [31]]])
    dataset = pairs(tmp_path, corpus, objective="nsp", short_sequence_probability=0.0)
    found = {(segments(sample)[1][0]) for epoch in range(60) if (sample := dataset.sample(epoch, 1)).pair_label}
    assert found == {10, 11, 30, 31}
    with pytest.raises(UserError, match="one document only"):
        pairs(tmp_path, corpus, objective="nsp", documents=(1, 2))


@pytest.mark.parametrize("short", [0.0, 0.3])
@pytest.mark.parametrize("whole_documents", [False, True])
@pytest.mark.parametrize("seq_length", [5, 48, 512])
def test_single_segments_use_every_token_once(
    tmp_path: Path, seq_length: int, whole_documents: bool, short: float
) -> None:
    corpus = random_corpus(tmp_path / "x", 2, 20)
    if whole_documents:
        bounds = corpus.document_indices.tolist()
        content = [[corpus.tokens(*pair).tolist()] for pair in itertools.pairwise(bounds)]
        corpus = write_corpus(tmp_path / "y", content)
    dataset = pairs(
        tmp_path, corpus, objective="none", short_sequence_probability=short, documents=(3, 20), seq_length=seq_length
    )
    used, lengths = [], []
    for index in range(len(dataset)):
        sample = dataset.sample(0, index)
        tokens = unmasked(sample)
        assert (tokens[0], tokens[-1], sample.pair_label) == (CLS, SEP, -1)
        assert 3 <= len(tokens) <= seq_length
        assert not sample.types.any()
        used += tokens[1:-1]
        lengths.append(len(tokens))
    assert used == corpus.tokens(*corpus.document_indices[[3, 20]].tolist()).tolist()
    if whole_documents and not short:
        assert np.mean(lengths) > 0.6 * seq_length or seq_length == 512
    use = dataset.use()
    assert use == (17, len(used), len(dataset), 0, 0, 0)


@pytest.mark.parametrize("objective", ["none", "sop"])
def test_long_sentences_are_cut_where_words_start(tmp_path: Path, objective: str) -> None:
    # Words of one to eight pieces: longer ones than the margin of 5 cannot all stay whole.
    rng = np.random.default_rng(1)
    word = [[6, *[8] * extra] for extra in range(8)]
    sentence = [token for extra in rng.integers(0, 5, size=300) for token in word[extra]]
    dataset = pairs(tmp_path, write_corpus(tmp_path / "x", [[sentence]]), objective=objective)
    starts = [dataset._read(index) for index in range(len(dataset))]
    assert len(starts) > 5
    for segment, borders in starts:
        assert segment.ids[0] == 6
        assert all(segment.ids[border] == 6 for border in borders[:-1])
        assert len(borders) > 2 or objective == "none"
    assert [token for segment, _ in starts for token in segment.ids.tolist()] == sentence
    unbroken = pairs(tmp_path, write_corpus(tmp_path / "y", [[[6] + [8] * 400]]), objective=objective)
    assert sum(len(unbroken._read(index)[0].ids) for index in range(len(unbroken))) == 401, "one word, cut anyway"


def test_what_pairs_leave_out_is_counted(tmp_path: Path) -> None:
    content = [[[10] * 20, [11] * 30], [[12] * 7], [[]], [[13] * 100], [[14] * 9]]
    corpus = write_corpus(tmp_path / "x", content)
    dataset = pairs(tmp_path, corpus, short_sequence_probability=0.0)
    assert len(dataset) == 2
    assert dataset.use() == (4, 166, 2, 2, 16, 5 + 55)
    assert pairs(tmp_path, corpus, documents=(0, 2), short_sequence_probability=0.0).use() == (2, 57, 1, 1, 7, 5)


def test_truncation_takes_from_both_ends_of_the_longer_segment(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "x", [[list(range(10, 16)), list(range(100, 145))]])
    dataset = pairs(tmp_path, corpus, short_sequence_probability=0.0)
    starts = set()
    for epoch in range(20):
        a, b = sorted(segments(dataset.sample(epoch, 0)))
        assert a == list(range(10, 16))
        assert len(b) == 45 - 6
        starts.add(b[0])
    assert len(starts) > 3
    assert 100 <= min(starts) <= max(starts) <= 106


def test_samples_are_a_pure_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    corpus = random_corpus(tmp_path / "x", 3, 20)
    dataset, again = pairs(tmp_path, corpus), pairs(tmp_path, corpus)
    np.random.seed(0)
    backwards = {index: again.sample(1, index) for index in reversed(range(len(again)))}
    assert all(same(dataset.sample(1, index), backwards[index]) for index in range(len(dataset)))
    assert not any(same(dataset.sample(0, index), backwards[index]) for index in range(len(dataset)))
    assert not all(same(pairs(tmp_path, corpus, seed=-12).sample(1, 0), backwards[0]) for _ in range(1))
    assert same(pickle.loads(pickle.dumps(dataset)).sample(1, 4), backwards[4])


def test_whole_words_are_masked_together_and_sentences_start_words(tmp_path: Path) -> None:
    # Each sentence is four pieces that all look like continuations: each sentence is one word.
    continuation = 5 + 3
    corpus = write_corpus(tmp_path / "x", [[[continuation] * 4] * 11])
    for epoch in range(10):
        sample = pairs(tmp_path, corpus, short_sequence_probability=0.0).sample(epoch, 0)
        runs = np.split(sample.mask_positions, np.flatnonzero(np.diff(sample.mask_positions) > 1) + 1)
        assert {len(run) % 4 for run in runs} == {0}
        single = pairs(tmp_path, corpus, short_sequence_probability=0.0, whole_word=False, max_ngram=1)
        assert len(single.sample(epoch, 0).mask_positions) == 7


def test_empty_sentences_and_documents_change_nothing(tmp_path: Path) -> None:
    content = [[[10, 11], [12], [13, 14, 15], [16]], [[20], [21, 22]]]
    padded = [[], [[], [10, 11], [], [12], [13, 14, 15], [16], []], [[]], [[20], [], [], [21, 22]]]
    plain = pairs(tmp_path, write_corpus(tmp_path / "x", content), short_sequence_probability=0.0)
    holes = pairs(tmp_path, write_corpus(tmp_path / "y", padded), short_sequence_probability=0.0)
    assert len(plain) == len(holes) == 2
    for epoch in range(10):
        assert all(same(plain.sample(epoch, index), holes.sample(epoch, index)) for index in range(2))


def test_ids_outside_the_vocabulary_are_reported_with_their_place(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "x", [[[10, 11], [12, 499, 500, 13]]])
    with pytest.raises(UserError, match=r"x\.bin byte 8 \(sentence 1\) holds token id 500 but the vocabulary has 500 "):
        pairs(tmp_path, corpus).sample(0, 0)


def test_the_index_is_cached_and_named_after_all_it_depends_on(tmp_path: Path) -> None:
    corpus = random_corpus(tmp_path / "x", 4, 30)
    cache = tmp_path / "deep" / "cache"
    first = pairs(tmp_path, corpus, cache_directory=cache)._index.copy()
    (file,) = cache.iterdir()
    stamp = file.stat().st_mtime_ns
    assert np.array_equal(pairs(tmp_path, corpus, cache_directory=cache)._index, first)
    assert np.array_equal(pairs(tmp_path, corpus)._index, first)
    assert file.stat().st_mtime_ns == stamp
    for number, change in enumerate(
        (
            {"seed": 12},
            {"seq_length": 40},
            {"objective": "none"},
            {"short_sequence_probability": 0.2},
            {"documents": (0, 29)},
            {"indexed": random_corpus(tmp_path / "x", 5, 30)},
        )
    ):
        pairs(tmp_path, change.pop("indexed", corpus), cache_directory=cache, **change)  # type: ignore[call-overload]
        assert len(list(cache.iterdir())) == number + 2
    content = file.read_bytes()
    np.save(tmp_path / "objects.npy", np.array([[{}, {}, {}]]), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", first)
    np.save(tmp_path / "numbers.npy", np.arange(3))
    others = [(tmp_path / name).read_bytes() for name in ("objects.npy", "archive.npz", "numbers.npy")]
    for damaged in (content[:200], b"", pickle.dumps({}), *others):
        file.unlink()
        file.write_bytes(damaged)
        assert np.array_equal(pairs(tmp_path, corpus, cache_directory=cache)._index, first), "it is built again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": (0, 99)}, r"Documents 0 to 99 were asked of .*x, which has 3"),
        ({"documents": (1, 1)}, r"Documents 1 to 1 of .*x give no sample"),
        ({"documents": (2, 3)}, r"Documents 2 to 3 of .*x give no sample"),
        ({"seq_length": 4}, "seq_length 4 is too short"),
        ({"max_predictions": 0}, "max_predictions 0"),
        ({"max_ngram": 0}, "max_ngram 0"),
        ({"mask_probability": 1.5}, r"mask_probability 1\.5 must lie between 0 and 1"),
        ({"short_sequence_probability": -1}, "short_sequence_probability -1"),
        ({"objective": "mlm"}, 'Objective "mlm" is unknown'),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    corpus = write_corpus(tmp_path / "x", [[[10], [11]], [[20], [21]], [[30]]])
    with pytest.raises(UserError, match=message):
        pairs(tmp_path, corpus, **changes)


def test_positions_beyond_the_epoch_are_errors(tmp_path: Path) -> None:
    dataset = pairs(tmp_path, write_corpus(tmp_path / "x", [[[10], [11]]]))
    assert len(dataset) == 1
    with pytest.raises(IndexError):
        dataset.sample(0, 1)


def test_float_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="float32"):
        pairs(tmp_path, write_corpus(tmp_path / "x", [[[10], [11]]], dtype="f4"))
