# SPDX-License-Identifier: Apache-2.0
"""Samples in rows: how full they are, in which order, and where the stream of them is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bert.data import packing
from megatron_bert.data.packing import RowStream, pack
from megatron_bert.data.sampling import BlendedCorpus
from megatron_bert.data.sentence_pairs import PairDataset

from .support import numbered_tokenizer, random_corpus


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [None, 1, 2, 5])
def test_best_fit_equals_a_plain_search(seed: int, most: int | None) -> None:
    lengths = np.random.default_rng(seed).integers(1, 51, size=300)
    plain: list[list[int]] = []
    for sample in sorted(range(300), key=lambda number: -lengths[number]):
        fits = [row for row in plain if len(row) != most and lengths[[*row, sample]].sum() <= 50]
        if fits:
            max(fits, key=lambda row: lengths[row].sum()).append(sample)
        else:
            plain.append([sample])
    found = pack(lengths, 50, most)
    assert sorted(sample for row in found for sample in row) == list(range(300))
    assert all(lengths[row].sum() <= 50 and (most is None or len(row) <= most) for row in found)
    # Rows with as much room are alike, so which of them is taken may differ, and what fills them.
    assert sorted(lengths[row].sum() for row in found) == sorted(lengths[row].sum() for row in plain)


def corpus(folder: Path, seed: int = 1, documents: int = 60, **changes: Any) -> BlendedCorpus:
    """Two corpora of random words, of which the first is read through five times as fast."""
    settings: dict[str, Any] = {"seq_length": 128, "max_predictions": 20, "seed": seed, **changes}
    tokenizer = numbered_tokenizer(folder)
    sets = []
    for number in range(2):
        indexed = random_corpus(folder / f"x{number}", number, documents)
        sets.append(PairDataset(indexed, (0, documents), tokenizer, **settings))
    return BlendedCorpus(sets, [1.0, 0.2], seed)


@pytest.mark.parametrize("objective", ["sop", "nsp", "none"])
@pytest.mark.parametrize(("seq_length", "filled"), [(20, False), (20, True), (128, True)])
def test_lengths_are_those_of_the_samples(tmp_path: Path, objective: str, seq_length: int, filled: bool) -> None:
    stream = corpus(tmp_path, objective=objective, seq_length=seq_length, filled=filled)
    numbers = np.arange(0, 4000, 7)
    assert stream.lengths(numbers).tolist() == [len(stream.sample(number).tokens) for number in numbers.tolist()]
    assert stream.locate(numbers)[1].max() > 0, "later epochs too"


@pytest.mark.parametrize(("objective", "least"), [("sop", 0.99), ("none", 0.98)])
def test_rows_of_long_documents_are_full(tmp_path: Path, objective: str, least: float) -> None:
    stream = corpus(tmp_path, documents=400, objective=objective, filled=True, short_sequence_probability=0.1)
    rows = RowStream(stream, length=128)
    assert rows.window_size == packing.WINDOW
    assert rows.fill() > least


def numbers(rows: RowStream, count: int) -> list[list[int]]:
    return [rows.row(number).tolist() for number in range(count)]


def test_every_sample_stands_in_one_row_of_its_window(tmp_path: Path) -> None:
    stream = corpus(tmp_path, documents=12)
    rows = RowStream(stream, length=128)
    size = rows.window_size
    assert size == max(64, sum(map(len, stream.datasets)))
    found: list[int] = []
    order = []
    for number in range(200):
        row = rows.row(number)
        lengths = stream.lengths(row)
        assert 0 < len(row) <= rows.most
        assert lengths.sum() <= 128
        assert (np.diff(lengths) <= 0).all()
        assert rows.samples_before(number) == len(found)
        found += row.tolist()
        order.append(int(lengths[0]))
        if len(found) % size == 0:
            assert sorted(found) == list(range(len(found)))
    assert len(found) > 2 * size
    assert order != sorted(order, reverse=True), "rows of a window come in a random order"


def test_the_order_depends_on_the_seed(tmp_path: Path) -> None:
    first, again, other = (RowStream(corpus(tmp_path, seed), length=128) for seed in (1, 1, 2))
    assert numbers(first, 50) == numbers(again, 50) != numbers(other, 50)


def test_any_row_is_a_place_to_go_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_OPEN_WINDOWS", 1)
    stream = corpus(tmp_path, documents=8)
    whole = RowStream(stream, length=128)
    wanted = numbers(whole, 120)
    for begin in range(100):
        position = whole.samples_before(begin)
        rest = RowStream(stream, length=128, first_sample=position)
        assert numbers(rest, 20) == wanted[begin : begin + 20]
        assert [rest.samples_before(n) for n in range(20)] == [whole.samples_before(begin + n) for n in range(20)]
    # Inside a row, which another run noted: the next one.
    place = next(place for place, row in enumerate(wanted) if len(row) > 1 and place > 30)
    inside = RowStream(stream, length=128, first_sample=whole.samples_before(place) + 1)
    assert numbers(inside, 10) == wanted[place + 1 : place + 11]
    assert inside.samples_before(0) == whole.samples_before(place + 1)


def test_how_many_samples_a_row_has_at_most(tmp_path: Path) -> None:
    stream = corpus(tmp_path, seq_length=20)
    long, short = RowStream(stream, length=20), RowStream(stream, length=128)
    assert long.most == 4
    lengths = stream.lengths(np.arange(short.window_size))
    fewest = len(pack(lengths, 128))
    assert len(pack(lengths, 128, short.most)) == pytest.approx(fewest, rel=0.002)
    assert len(pack(lengths, 128, short.most // 2)) > fewest * 1.002
    alone = RowStream(stream, length=128, most=1)
    assert [len(row) for row in numbers(alone, 70)] == [1] * 70
    assert alone.samples_per_row() == 1
