"""Held-out loss, perplexity and accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.distributed.fsdp import FSDPModule

from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.pretraining import BertForPretraining, correct_counts, loss_sums
from parallel.cross_entropy import IGNORED
from parallel.mesh import DATA_AXES, ParallelMesh


@torch.no_grad()
def evaluate(model: BertForPretraining, batches: Iterable[MicroBatch], mesh: ParallelMesh) -> dict[str, float]:
    """Score a model without dropout; every rank calls, each with the batches of its data rank.

    Returns:
        ``mlm_loss`` (nats a masked token), ``perplexity`` (its exponential), ``mlm_accuracy`` (share of masked tokens
        predicted right), and with a sentence-pair head ``sop_loss`` (nats a pair) and ``sop_accuracy``.
    """
    totals = torch.zeros(6, dtype=torch.float64, device=mesh.device)
    vocab_size = model.config.vocab_size
    for batch in batches:
        logits = model(batch)
        loss = loss_sums(logits, batch, vocab_size, model.tp)
        right = correct_counts(logits, batch, vocab_size, model.tp)
        slots, pairs = (batch.slot_labels != IGNORED).sum(), (batch.pair_labels != IGNORED).sum()
        totals += torch.stack([x.double() for x in (loss.masked, right.masked, slots, loss.pair, right.pair, pairs)])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # no backward pass came to give the gathered parameters back
    mlm, mlm_right, slots, pair, pair_right, pairs = mesh.all_reduce(totals, DATA_AXES).tolist()
    scores = {
        "mlm_loss": mlm / slots,
        "perplexity": math.exp(min(mlm / slots, 700.0)),
        "mlm_accuracy": mlm_right / slots,
    }
    if pairs:
        scores |= {"sop_loss": pair / pairs, "sop_accuracy": pair_right / pairs}
    return scores
