# SPDX-License-Identifier: Apache-2.0
"""Held-out loss, perplexity and accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.pretraining import PretrainingLogits, correct_counts, loss_sums
from megatron_bert.training.staged_model import StagedModel
from parallel.cross_entropy import IGNORED
from parallel.mesh import DATA_AXES, ParallelMesh, TensorParallel
from parallel.pipeline.engine import PipelineEngine


@torch.no_grad()
def evaluate(
    model: StagedModel, engine: PipelineEngine, batches: Iterator[MicroBatch], rounds: int, mesh: ParallelMesh
) -> dict[str, float]:
    """Score a model without dropout; every rank calls, each with the batches of its data rank.

    Args:
        model: this rank's stages.
        engine: runs a forward-only schedule.
        batches: as many as ``rounds`` runs of the schedule take.
        rounds: how often to run the schedule.
        mesh: where the run is laid out.

    Returns:
        ``mlm_loss`` (nats a masked token), ``perplexity`` (its exponential), ``mlm_accuracy`` (share of masked tokens
        predicted right), and with a sentence-pair head ``sop_loss`` (nats a pair) and ``sop_accuracy``.
    """
    totals = torch.zeros(6, dtype=torch.float64, device=mesh.device)
    for _ in range(rounds):
        _score(
            [next(batches) for _ in range(engine.schedule.microbatches)], model, engine, totals, mesh.tensor_parallel
        )
    model.reshard()
    mesh.all_reduce(totals, (*DATA_AXES, "pipeline"))
    mlm, mlm_right, slots, pair, pair_right, pairs = totals.tolist()
    perplexity = math.exp(min(mlm / slots, 700.0))  # a diverged model's does not fit a float
    scores = {"mlm_loss": mlm / slots, "perplexity": perplexity, "mlm_accuracy": mlm_right / slots}
    if pairs:
        scores |= {"sop_loss": pair / pairs, "sop_accuracy": pair_right / pairs}
    return scores


def _score(
    batches: list[MicroBatch], model: StagedModel, engine: PipelineEngine, totals: Tensor, tp: TensorParallel
) -> None:
    """Run the stages over micro batches; the last stage adds its sums to ``totals``."""
    vocab_size = model.config.vocab_size

    def add(index: int, output: PretrainingLogits) -> None:
        batch = batches[index]
        loss, right = loss_sums(output, batch, vocab_size, tp), correct_counts(output, batch, vocab_size, tp)
        slots, pairs = (batch.slot_labels != IGNORED).sum(), (batch.pair_labels != IGNORED).sum()
        sums = (loss.masked, right.masked, slots, loss.pair, right.pair, pairs)
        totals.add_(torch.stack([value.double() for value in sums]))

    model.run_forward(engine, batches, add)
