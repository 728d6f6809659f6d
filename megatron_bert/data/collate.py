# SPDX-License-Identifier: Apache-2.0
"""Samples to micro batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_bert.data.sentence_pairs import Sample
from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.sequences import SequenceLayout, filling, longest_first
from parallel.cross_entropy import IGNORED


def collate(
    samples: Sequence[Sample],
    numbers: Sequence[int],
    *,
    seq_length: int,
    max_predictions: int,
    pad_id: int,
    packed: bool = False,
    multiple: int = 1,
) -> MicroBatch:
    """Put samples on one flat token axis.

    Args:
        samples: the samples, none longer than ``seq_length``.
        numbers: their numbers in the training stream, which dropout masks depend on.
        seq_length: S; the padded form is a rectangle of this many tokens per sample.
        max_predictions: slots per sample; the batch has this many times the number of samples, used or not, so that
            shapes do not depend on the data.
        pad_id: token id of padding.
        packed: sequences end to end without padding, the longest first, instead of a rectangle.
        multiple: packed only: the token axis is filled up to a multiple of this, so that tensor ranks can divide it;
            to a round size in any case. The filling repeats the first tokens.
    """
    lengths = np.array([len(sample.tokens) for sample in samples], dtype=np.int64)
    if packed:
        order, starts = longest_first(lengths)
        total = int(lengths.sum())
    else:
        starts = np.arange(len(samples), dtype=np.int64) * seq_length
        total = len(samples) * seq_length
    tokens = np.full(total, pad_id, dtype=np.int64)
    types = np.zeros(total, dtype=np.int64)
    positions = np.zeros(total, dtype=np.int64)
    owner = np.zeros(total, dtype=np.int64)
    if not packed:
        positions[:] = np.tile(np.arange(seq_length), len(samples))
        owner[:] = np.repeat(np.asarray(numbers, dtype=np.int64), seq_length)
    slots = np.zeros(len(samples) * max_predictions, dtype=np.int64)
    labels = np.full(len(samples) * max_predictions, IGNORED, dtype=np.int64)
    pair_labels = np.array([s.pair_label if s.pair_label >= 0 else IGNORED for s in samples], dtype=np.int64)
    for row, (sample, number, start, length) in enumerate(zip(samples, numbers, starts, lengths, strict=True)):
        where = slice(start, start + length)
        tokens[where], types[where] = sample.tokens, sample.types
        positions[where], owner[where] = np.arange(length), number
        first, count = row * max_predictions, len(sample.mask_positions)
        slots[first : first + count] = start + sample.mask_positions
        labels[first : first + count] = sample.mask_labels
    if packed:
        fill = filling(total, multiple)
        tokens, types, positions, owner = (np.resize(a, total + fill) for a in (tokens, types, positions, owner))
        layout = SequenceLayout.packed(torch.from_numpy(lengths[order]), seq_length, fill)
    elif (lengths == seq_length).all():
        layout = SequenceLayout.rectangle(len(samples), seq_length)
    else:
        mask = torch.arange(seq_length) < torch.from_numpy(lengths)[:, None]
        layout = SequenceLayout.rectangle(len(samples), seq_length, mask)
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        types=torch.from_numpy(types),
        samples=torch.from_numpy(owner),
        layout=layout,
        slots=torch.from_numpy(slots),
        slot_labels=torch.from_numpy(labels),
        first_tokens=torch.from_numpy(starts),
        pair_labels=torch.from_numpy(pair_labels),
        lengths=tuple(int(length) for length in lengths),
    )
