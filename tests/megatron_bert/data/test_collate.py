# SPDX-License-Identifier: Apache-2.0
"""Samples on the token axis: what lies where, in both forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_bert.data.collate import collate
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


def make(packed: bool = False, multiple: int = 1) -> MicroBatch:
    return collate(SAMPLES, NUMBERS, seq_length=S, max_predictions=K, pad_id=PAD, packed=packed, multiple=multiple)


@pytest.mark.parametrize(("packed", "starts"), [(False, [0, 8, 16]), (True, [14, 0, 8])])
def test_samples_are_where_they_start(packed: bool, starts: list[int]) -> None:
    batch = make(packed)
    assert batch.first_tokens.tolist() == starts
    assert batch.lengths == (5, 8, 6)
    for start, given, number in zip(starts, SAMPLES, NUMBERS, strict=True):
        where = slice(start, start + len(given.tokens))
        assert batch.tokens[where].tolist() == given.tokens.tolist()
        assert batch.types[where].tolist() == given.types.tolist()
        assert batch.positions[where].tolist() == list(range(len(given.tokens)))
        assert set(batch.samples[where].tolist()) == {number}


@pytest.mark.parametrize("packed", [False, True])
def test_slots_and_labels(packed: bool) -> None:
    batch = make(packed)
    starts = batch.first_tokens.tolist()
    assert batch.slots.shape == batch.slot_labels.shape == (len(SAMPLES) * K,)
    assert batch.slots.tolist() == [
        *(starts[0] + 1, starts[0] + 3, 0),
        *(starts[1] + 2, 0, 0),
        *(starts[2] + 1, starts[2] + 2, starts[2] + 4),
    ]
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


@pytest.mark.parametrize(("multiple", "fill"), [(1, 0), (19, 0), (2, 1), (8, 5), (64, 45)])
def test_packed_is_filled_to_a_multiple(multiple: int, fill: int) -> None:
    batch = make(packed=True, multiple=multiple)
    assert batch.tokens.shape == (19 + fill,)
    assert batch.tokens.shape[0] % multiple == 0
    for rows in (batch.tokens, batch.positions, batch.types, batch.samples):
        assert rows[19:].tolist() == (rows[:19].tolist() * 3)[:fill], "filling repeats the first tokens"
    # The filling is sequences of its own, none longer than others: nothing attends to it.
    offsets = batch.layout.boundaries
    assert offsets is not None
    assert offsets.tolist() == [0, 8, 14, 19, *range(24, 19 + fill, 5), *([19 + fill] if fill else [])]
    assert (batch.layout.length, batch.layout.fill) == (S, fill)


def test_all_are_indices() -> None:
    for packed in (False, True):
        batch = make(packed)
        for tensor in (batch.tokens, batch.positions, batch.types, batch.samples, batch.slots, batch.slot_labels):
            assert tensor.dtype == torch.int64
