# SPDX-License-Identifier: Apache-2.0
"""Samples to micro batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_bert.data.sentence_pairs import Sample
from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.sequences import SequenceLayout, longest_first
from parallel.cross_entropy import IGNORED


def collate(
    samples: Sequence[Sample], numbers: Sequence[int], *, seq_length: int, max_predictions: int, pad_id: int
) -> MicroBatch:
    """Put samples on the token axis as a rectangle, padded.

    Args:
        samples: the samples, none longer than ``seq_length``.
        numbers: their numbers in the training stream, which dropout masks depend on.
        seq_length: S, tokens of a sample with its padding.
        max_predictions: slots per sample; the batch has this many times the number of samples, used or not, so that
            shapes do not depend on the data.
    """
    lengths = np.array([len(sample.tokens) for sample in samples], dtype=np.int64)
    starts = np.arange(len(samples), dtype=np.int64) * seq_length
    tokens = np.full(len(samples) * seq_length, pad_id, dtype=np.int64)
    types = np.zeros_like(tokens)
    positions = np.tile(np.arange(seq_length), len(samples))
    owner = np.repeat(np.asarray(numbers, dtype=np.int64), seq_length)
    slots = np.zeros(len(samples) * max_predictions, dtype=np.int64)
    labels = np.full(len(samples) * max_predictions, IGNORED, dtype=np.int64)
    pair_labels = np.array([s.pair_label if s.pair_label >= 0 else IGNORED for s in samples], dtype=np.int64)
    for row, (sample, start, length) in enumerate(zip(samples, starts, lengths, strict=True)):
        where = slice(start, start + length)
        tokens[where], types[where] = sample.tokens, sample.types
        first, count = row * max_predictions, len(sample.mask_positions)
        slots[first : first + count] = start + sample.mask_positions
        labels[first : first + count] = sample.mask_labels
    if (lengths == seq_length).all():
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


def collate_rows(
    rows: Sequence[Sequence[tuple[int, Sample]]], *, length: int, most: int, slots: int, step_samples: int | None = None
) -> MicroBatch:
    """Put rows of samples on the token axis, in shapes that depend on the arguments below alone.

    Args:
        rows: of each row the samples, at most ``length`` tokens together, and their numbers in the training stream.
        length: tokens of a row. What its samples leave is filled up, with a repetition of the first tokens.
        most: samples of a row at most.
        slots: masked tokens of a row at most.
        step_samples: of the training stream, in the rows of the step's global batch.
    """
    sizes = np.zeros((len(rows), most), dtype=np.int64)
    for row, samples in enumerate(rows):
        sizes[row, : len(samples)] = [len(sample.tokens) for _, sample in samples]
    order, starts = longest_first(sizes.flatten())
    held = [rows[place // most][place % most] for place in order if sizes.flat[place]]
    tokens, types, positions, owners = (
        torch.from_numpy(np.resize(np.concatenate(parts).astype(np.int64), len(rows) * length))
        for parts in (
            [sample.tokens for _, sample in held],
            [sample.types for _, sample in held],
            [np.arange(len(sample.tokens)) for _, sample in held],
            [np.full(len(sample.tokens), number) for number, sample in held],
        )
    )
    places = np.zeros(len(rows) * slots, dtype=np.int64)
    labels = np.full(len(rows) * slots, IGNORED, dtype=np.int64)
    pair_labels = np.full(sizes.shape, IGNORED, dtype=np.int64)
    for row, samples in enumerate(rows):
        first = row * slots
        for column, (_, sample) in enumerate(samples):
            used = slice(first, first + len(sample.mask_positions))
            assert used.stop <= (row + 1) * slots, "slots are for the most that a row may have"
            places[used] = starts[row * most + column] + sample.mask_positions
            labels[used] = sample.mask_labels
            if sample.pair_label >= 0:
                pair_labels[row, column] = sample.pair_label
            first = used.stop
    return MicroBatch(
        tokens=tokens,
        positions=positions,
        types=types,
        samples=owners,
        layout=SequenceLayout.rows([row[row > 0].tolist() for row in sizes], length, most),
        slots=torch.from_numpy(places),
        slot_labels=torch.from_numpy(labels),
        first_tokens=torch.from_numpy(np.where(sizes.flatten() > 0, starts, 0)),
        pair_labels=torch.from_numpy(pair_labels.flatten()),
        lengths=tuple(len(sample.tokens) for samples in rows for _, sample in samples),
        step_samples=step_samples,
    )
