# SPDX-License-Identifier: Apache-2.0
"""Held-out loss, perplexity and accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.pretraining import PretrainingLogits, correct_counts, loss_sums
from megatron_bert.training.staged_model import StagedModel
from parallel.cross_entropy import IGNORED
from parallel.mesh import DATA_AXES, ParallelMesh
from parallel.pipeline.engine import PipelineEngine


def evaluate(
    model: StagedModel, engine: PipelineEngine, batches: Iterable[MicroBatch], mesh: ParallelMesh
) -> dict[str, float]:
    """Score a model without dropout; every rank calls, each with the batches of its data rank.

    Args:
        engine: runs a forward-only schedule.
        batches: as many as some runs of the schedule take.

    Returns:
        ``mlm_loss`` (nats per masked token), ``perplexity`` (its exponential), ``mlm_accuracy`` (share of masked tokens
        predicted right), and with a sentence-pair head ``sop_loss`` (nats per pair) and ``sop_accuracy``.
    """
    totals = torch.zeros(6, dtype=torch.float64, device=mesh.device)
    vocab_size, tp = model.config.vocab_size, mesh.tensor_parallel

    def add(_: int, batch: MicroBatch, output: PretrainingLogits) -> None:
        loss, right = loss_sums(output, batch, vocab_size, tp), correct_counts(output, batch, vocab_size, tp)
        slots, pairs = (batch.slot_labels != IGNORED).sum(), (batch.pair_labels != IGNORED).sum()
        sums = (loss.masked, right.masked, slots, loss.pair, right.pair, pairs)
        totals.add_(torch.stack([value.double() for value in sums]))

    model.infer(engine, batches, add)
    mesh.all_reduce(totals, (*DATA_AXES, "pipeline"))
    mlm, mlm_right, slots, pair, pair_right, pairs = totals.tolist()
    perplexity = math.exp(min(mlm / slots, 700.0))  # a diverged model's does not fit a float
    scores = {"mlm_loss": mlm / slots, "perplexity": perplexity, "mlm_accuracy": mlm_right / slots}
    if pairs:
        scores |= {"sop_loss": pair / pairs, "sop_accuracy": pair_right / pairs}
    return scores
