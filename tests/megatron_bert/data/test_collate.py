# SPDX-License-Identifier: Apache-2.0
"""Samples on the token axis: what lies where, in both forms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from megatron_bert.data.collate import collate, collate_rows
from megatron_bert.data.sentence_pairs import Sample
from megatron_bert.model.batch import MicroBatch

S, K, PAD = 8, 3, 99


def sample(length: int, masked: list[int], label: int) -> Sample:
    """Tokens 100, 101, ...; the second half is the second segment; labels are 200 + position."""
    return Sample(
        tokens=np.arange(100, 100 + length),
        types=(np.arange(length) >= length // 2).astype(np.int64),
        mask_positions=np.array(masked, dtype=np.int64),
        mask_labels=200 + np.array(masked, dtype=np.int64),
        pair_label=label,
    )


SAMPLES = [sample(5, [1, 3], 0), sample(8, [2], 1), sample(6, [1, 2, 4], -1)]
NUMBERS = [7, 3, 11]


def make() -> MicroBatch:
    return collate(SAMPLES, NUMBERS, seq_length=S, max_predictions=K, pad_id=PAD)


def make_rows(rows: Sequence[Sequence[int]] = ((0, 2), (1,)), length: int = 12, most: int = 3) -> MicroBatch:
    """Samples by their places above, in rows."""
    given = [[(NUMBERS[place], SAMPLES[place]) for place in row] for row in rows]
    return collate_rows(given, length=length, most=most, slots=7, step_samples=5)


def test_samples_are_where_they_start() -> None:
    batch = make()
    assert batch.first_tokens.tolist() == [0, 8, 16]
    assert batch.lengths == (5, 8, 6)
    for start, given, number in zip([0, 8, 16], SAMPLES, NUMBERS, strict=True):
        where = slice(start, start + len(given.tokens))
        assert batch.tokens[where].tolist() == given.tokens.tolist()
        assert batch.types[where].tolist() == given.types.tolist()
        assert batch.positions[where].tolist() == list(range(len(given.tokens)))
        assert set(batch.samples[where].tolist()) == {number}


def test_slots_and_labels() -> None:
    batch = make()
    assert batch.slots.shape == batch.slot_labels.shape == (len(SAMPLES) * K,)
    assert batch.slots.tolist() == [1, 3, 0, 8 + 2, 0, 0, 16 + 1, 16 + 2, 16 + 4]
    assert batch.slot_labels.tolist() == [201, 203, -100, 202, -100, -100, 201, 202, 204]
    assert batch.pair_labels.tolist() == [0, 1, -100]


def test_padding_of_the_rectangle() -> None:
    batch = make()
    tokens = batch.tokens.view(3, S)
    assert tokens[0, 5:].tolist() == [PAD] * 3
    assert tokens[2, 6:].tolist() == [PAD] * 2
    assert batch.types.view(3, S)[0, 5:].tolist() == [0] * 3
    assert batch.positions.view(3, S).tolist() == [list(range(S))] * 3
    assert batch.samples.view(3, S).tolist() == [[number] * S for number in NUMBERS]
    mask = batch.layout.key_mask
    assert mask is not None
    assert mask.tolist() == [[place < length for place in range(S)] for length in batch.lengths]


def test_a_full_rectangle_needs_no_mask() -> None:
    full = collate([sample(S, [1], 0)] * 2, [0, 1], seq_length=S, max_predictions=K, pad_id=PAD)
    assert full.layout.key_mask is None
    assert PAD not in full.tokens


def test_rows_stand_longest_sample_first_and_are_filled_up() -> None:
    batch = make_rows()
    starts = {0: 14, 1: 0, 2: 8}
    for place, start in starts.items():
        given, where = SAMPLES[place], slice(start, start + len(SAMPLES[place].tokens))
        assert batch.tokens[where].tolist() == given.tokens.tolist()
        assert batch.types[where].tolist() == given.types.tolist()
        assert batch.positions[where].tolist() == list(range(len(given.tokens)))
        assert set(batch.samples[where].tolist()) == {NUMBERS[place]}
    assert batch.tokens.shape == (24,)
    for rows in (batch.tokens, batch.positions, batch.types, batch.samples):
        assert rows[19:].tolist() == rows[:5].tolist(), "filling repeats the first tokens"
    assert (batch.lengths, batch.step_samples) == ((5, 6, 8), 5)
    assert batch.first_tokens.tolist() == [14, 8, 0, 0, 0, 0]
    assert batch.pair_labels.tolist() == [0, -100, -100, 1, -100, -100]
    assert batch.slots.tolist() == [15, 17, 9, 10, 12, 0, 0, 2, 0, 0, 0, 0, 0, 0]
    assert batch.slot_labels.tolist() == [201, 203, 201, 202, 204, -100, -100, 202, *[-100] * 6]
    layout = batch.layout
    assert layout.boundaries is not None
    assert layout.owners is not None
    assert layout.row_positions is not None
    assert layout.boundaries.tolist() == [0, 8, 14, 19, 19, 19, 19, 20, 24]
    assert (layout.batch, layout.length, layout.fill) == (2, 12, 5)
    assert layout.lengths == [8, 6, 5, 1, 4]
    assert layout.owners.tolist() == [[0] * 5 + [1] * 6 + [3], [0] * 8 + [3] * 4]
    assert layout.row_positions.tolist() == [[*range(5), *range(6), 0], [*range(8), *range(4)]]
    # In the rectangle, a row's samples follow one another as they were given, and what is left is behind them.
    assert layout.to_rectangle(batch.samples)[0].tolist() == [7] * 5 + [11] * 6 + [3]
    assert layout.to_rectangle(batch.tokens)[1].tolist() == [*SAMPLES[1].tokens, *batch.tokens[20:]]
    assert torch.equal(layout.from_rectangle(layout.to_rectangle(batch.tokens)), batch.tokens)
    mask = layout.rectangle_mask()
    assert mask is not None
    assert mask.shape == (2, 1, 12, 12)
    for row, query, key in itertools.product(range(2), range(12), range(12)):
        assert mask[row, 0, query, key] == (layout.owners[row, query] == layout.owners[row, key])
    real = layout.real_places()
    assert real is not None
    assert real.tolist() == [[True] * 11 + [False], [True] * 8 + [False] * 4]


def test_shapes_of_rows_do_not_depend_on_what_is_in_them() -> None:
    batches = [make_rows(rows) for rows in (((0, 2), (1,)), ((0,), (2,)), ((1,), (2,)))]
    batches.append(make_rows(((0, 2), (0, 2)), 11))
    for batch in batches[1:3]:
        for name, tensor in batch.tensors().items():
            assert tensor.shape == getattr(batches[0], name).shape, name
        for name in ("boundaries", "places", "owners", "row_positions"):
            assert getattr(batch.layout, name).shape == getattr(batches[0].layout, name).shape, name
    full = batches[3].layout
    assert full.fill == 0
    assert full.real_tokens() is None
    assert full.real_places() is None
    assert full.rectangle_mask() is not None, "its rows hold two sequences each"


def test_all_are_indices() -> None:
    for batch in (make(), make_rows()):
        for tensor in (batch.tokens, batch.positions, batch.types, batch.samples, batch.slots, batch.slot_labels):
            assert tensor.dtype == torch.int64
