# SPDX-License-Identifier: Apache-2.0
"""Instances of a fine-tuning task to micro batches, without padding."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_bert.model.batch import TaskBatch
from megatron_bert.model.sequences import Bounds, SequenceLayout, filling, longest_first
from megatron_bert.model.task_heads.table import HEADS
from megatron_bert.tasks.task import Head, Instance


def instance_tokens(instance: Instance) -> int:
    """Tokens of all sequences of an instance."""
    return sum(len(feature.tokens) for feature in instance.features)


def bounds_of(instances: Iterable[Instance], most: int, multiple: int = 1) -> Bounds:
    """Bounds of micro batches of at most so many of some instances.

    Args:
        instances: at least one.
        multiple: as of :func:`collate_instances`.
    """
    found = list(instances)
    features = [len(instance.features) for instance in found]
    longest = max(len(feature.tokens) for instance in found for feature in instance.features)
    return Bounds(most * max(features), longest, multiple)


def collate_instances(
    instances: Sequence[Instance],
    numbers: Sequence[int],
    head: Head,
    *,
    most_features: int,
    multiple: int = 1,
    bounds: Bounds | None = None,
) -> TaskBatch:
    """Put the sequences of instances end to end, the longest first.

    Args:
        instances: at least one.
        numbers: their numbers in the training stream, which dropout masks depend on.
        most_features: most sequences of an instance of the task; their dropout masks differ.
        multiple: the token axis is filled up to a multiple of this, so that tensor ranks can divide it; to a round size
            in any case. The filling repeats the first tokens, so that ranges of activations see nothing new.
        bounds: of all micro batches, to give them few different shapes, which compiled code is quickest with.
    """
    features = [feature for instance in instances for feature in instance.features]
    owners = [number for number, instance in enumerate(instances) for _ in instance.features]
    samples = [n * most_features + i for n, instance in zip(numbers, instances) for i in range(len(instance.features))]
    lengths = np.array([len(feature.tokens) for feature in features], dtype=np.int64)
    order, starts = longest_first(lengths)
    fill = filling(int(lengths.sum()), multiple, few=bounds is not None)
    rows = np.concatenate([start + feature.rows for start, feature in zip(starts, features)])
    row_owners = np.concatenate([np.full(len(f.rows), owner) for owner, f in zip(owners, features)])
    counts = np.bincount(row_owners, minlength=len(instances))
    places = np.concatenate([np.arange(count) for count in counts])
    return TaskBatch(
        tokens=_joined([features[i].tokens for i in order], fill),
        positions=_joined([np.arange(lengths[i]) for i in order], fill),
        types=_joined([features[i].types for i in order], fill),
        samples=_joined([np.full(lengths[i], samples[i]) for i in order], fill),
        layout=SequenceLayout.packed(torch.from_numpy(lengths[order]), int(lengths.max()), fill, bounds),
        first_tokens=torch.from_numpy(starts),
        lengths=tuple(int(length) for length in lengths),
        rows=torch.from_numpy(rows),
        owners=torch.from_numpy(row_owners.astype(np.int64)),
        places=torch.from_numpy(places.astype(np.int64)),
        widest=int(counts.max()),
        instances=len(instances),
        labels=HEADS[head.kind].labels([torch.from_numpy(instance.label) for instance in instances]),
    )


def _joined(parts: list[np.ndarray], fill: int) -> Tensor:
    values = np.concatenate(parts).astype(np.int64)
    return torch.from_numpy(np.concatenate([values, np.resize(values, fill)]))


def stream_instances(numbers: range, count: int, seed: int) -> list[int]:
    """Which of ``count`` instances stand at places ``numbers`` of an endless stream that shuffles them every epoch."""
    return [int(_epoch_order(count, seed, number // count)[number % count]) for number in numbers]


@functools.lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
