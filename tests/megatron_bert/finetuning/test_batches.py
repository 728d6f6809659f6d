# SPDX-License-Identifier: Apache-2.0
"""Which instances stand in which batch."""

from __future__ import annotations

import numpy as np
import torch

from megatron_bert.data.sampling import BatchShare
from megatron_bert.finetuning.batches import bounds_of, collate_instances, stream_instances
from megatron_bert.tasks.encoding import Feature
from megatron_bert.tasks.task import Instance
from tests.megatron_bert.finetuning.support import HEADS, random_instances


def test_every_epoch_has_every_instance_once_in_another_order() -> None:
    epochs = [stream_instances(range(start, start + 10), 10, 3) for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert stream_instances(range(5, 15), 10, 3) == epochs[0][5:] + epochs[1][:5]
    assert stream_instances(range(10), 10, 4) != epochs[0]


def test_a_step_has_the_same_instances_at_every_layout() -> None:
    def instances_of_steps(data: int, micro: int) -> list[list[int]]:
        per_rank = []
        for rank in range(data):
            of = BatchShare(global_batch=12, micro_batch=micro, data_rank=rank, data_size=data, first_sample=6)
            share = of.micro_batches_per_step
            places = [of.samples(index) for index in range(3 * share)]
            per_rank.append([[n for place in places[s * share : (s + 1) * share] for n in place] for s in range(3)])
        return [sorted(n for steps in per_rank for n in steps[s]) for s in range(3)]

    expected = [list(range(6 + 12 * step, 18 + 12 * step)) for step in range(3)]
    for data, micro in ((1, 12), (1, 4), (2, 6), (2, 3), (3, 2), (4, 1)):
        assert instances_of_steps(data, micro) == expected


def test_sequences_stand_end_to_end() -> None:
    instances = random_instances("choice", 3)
    batch = collate_instances(instances, [5, 6, 7], HEADS["choice"], most_features=4, multiple=8)
    features = [feature for instance in instances for feature in instance.features]
    lengths = [len(feature.tokens) for feature in features]
    assert batch.lengths == tuple(lengths)
    assert batch.tokens.shape[0] % 8 == 0
    assert batch.tokens.shape[0] - sum(lengths) == batch.layout.fill < 8
    for start, feature in zip(batch.first_tokens.tolist(), features, strict=True):
        assert np.array_equal(batch.tokens[start : start + len(feature.tokens)], feature.tokens)
        assert np.array_equal(batch.types[start : start + len(feature.tokens)], feature.types)
        assert batch.positions[start] == 0
    samples = [batch.samples[start].item() for start in batch.first_tokens.tolist()]
    assert len(set(samples)) == len(features), "dropout masks of choices differ"
    scores = batch.by_instance(torch.arange(len(features), dtype=torch.float32))
    assert [int((row > -torch.inf).sum()) for row in scores] == [len(instance.features) for instance in instances]
    assert scores[scores > -torch.inf].tolist() == list(range(len(features)))


def _shapes(instances: list[Instance], size: int, *, few: bool) -> set[tuple[int, ...]]:
    """Of what the layers of compiled code see of micro batches."""
    bounds = bounds_of(instances, size) if few else None
    found = set()
    for start in range(0, len(instances) - size, size):
        of = instances[start : start + size]
        batch = collate_instances(of, range(start, start + size), HEADS["single"], most_features=1, bounds=bounds)
        assert batch.layout.boundaries is not None
        found.add((len(batch.tokens), len(batch.layout.boundaries), batch.layout.length, batch.layout.batch))
    return found


def test_compiled_code_sees_few_shapes_of_a_corpus() -> None:
    """Of 500 micro batches of 32 sentences, of lengths as those of SST-2 or longer."""
    random = np.random.default_rng(5)
    lengths = 3 + np.minimum(random.geometric(1 / 24, 16_000), 125)
    features = [Feature(np.ones(length, dtype=np.int64), np.zeros(length), np.array([0])) for length in lengths]
    instances = [Instance((feature,), np.array([0]), number) for number, feature in enumerate(features)]
    many, few = (_shapes(instances, 32, few=few) for few in (False, True))
    assert len(many) > 300
    assert len(few) <= 12
    assert len({shape[1:] for shape in few}) == 1, "they differ in their tokens alone"
