# SPDX-License-Identifier: Apache-2.0
"""Logits of a task's instances, computed by all ranks of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_bert.finetuning.batches import bounds_of, collate_instances, instance_tokens
from megatron_bert.model.batch import TaskBatch
from megatron_bert.model.task_heads.kind import HeadKind
from megatron_bert.model.task_heads.table import HEADS
from megatron_bert.tasks.task import Head, Instance
from megatron_bert.training.staged_model import StagedModel
from parallel.mesh import DATA_AXES, ParallelMesh
from parallel.object_collectives import gather_on_first
from parallel.pipeline.engine import PipelineEngine


class Scored(NamedTuple):
    """What a model says of instances.

    Attributes:
        logits: on rank 0, for each instance float32, as its kind of head has them; empty on other ranks.
        loss: mean loss over the labeled instances (tokens), the same on every rank; None where nothing is labeled.
    """

    logits: list[np.ndarray]
    loss: float | None


def score_instances(
    model: StagedModel,
    engine: PipelineEngine,
    mesh: ParallelMesh,
    instances: Sequence[Instance],
    head: Head,
    *,
    batch_size: int,
    few_shapes: bool = False,
) -> Scored:
    """Run the model over instances without dropout; every rank calls with the same instances.

    Instances of similar length go together, the longest first, so that what does not fit in memory shows at once.

    Args:
        engine: runs a forward-only schedule.
        instances: at least one.
        batch_size: most instances of a forward pass.
        few_shapes: give passes few different shapes, for compiled code.
    """
    kind = HEADS[head.kind]
    order = sorted(range(len(instances)), key=lambda index: -instance_tokens(instances[index]))
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    data, rank = mesh.layout.data, mesh.data_rank
    # Every data rank runs equally often, as sharded parameters are gathered together: some repeat the last chunk.
    per_round = engine.schedule.microbatches * data
    numbers = range(rank, -(-len(chunks) // per_round) * per_round, data)
    chosen = [chunks[min(number, len(chunks) - 1)] for number in numbers]
    multiple = mesh.layout.split_tokens
    bounds = bounds_of(instances, batch_size, multiple) if few_shapes else None
    batches = (
        collate_instances(
            [instances[index] for index in chunk],
            chunk,
            head,
            most_features=1,
            multiple=multiple,
            bounds=bounds,
        ).to(mesh.device)
        for chunk in chosen
    )
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    mine: list[tuple[int, np.ndarray]] = []

    def take(index: int, batch: TaskBatch, output: Tensor) -> None:
        if numbers[index] < len(chunks):
            counted = kind.counted(batch.labels).sum()
            sums.add_(torch.stack((kind.loss_sum(output, batch, head.problem).double(), counted.double())))
            mine.extend(zip(chosen[index], _by_instance(output, batch, kind), strict=True))

    model.infer(engine, batches, take)
    mesh.all_reduce(sums, (*DATA_AXES, "pipeline"))
    total, count = sums.tolist()
    return Scored(_gathered(mine, mesh, len(instances)), total / count if count else None)


def _by_instance(logits: Tensor, batch: TaskBatch, kind: HeadKind) -> list[np.ndarray]:
    counts = torch.bincount(batch.owners, minlength=batch.instances).cpu()
    parts = np.split(logits.float().cpu().numpy(), np.cumsum(counts.numpy())[:-1])
    return [kind.of_instance(part) for part in parts]


def _gathered(mine: list[tuple[int, np.ndarray]], mesh: ParallelMesh, count: int) -> list[np.ndarray]:
    """All instances' logits in their order on rank 0, from one tensor rank of each last stage."""
    parts = gather_on_first(mine if mesh.coordinate["tensor"] == 0 else [])
    if not parts:
        return []
    found = dict(pair for part in parts for pair in part)
    return [found[index] for index in range(count)]
