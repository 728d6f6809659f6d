# SPDX-License-Identifier: Apache-2.0
"""The float model as a teacher of the quantized one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bert.finetuning.losses import label_weights
from megatron_bert.model.finetuning import TaskBatch
from megatron_bert.tasks.task import Head


def distillation_sum(
    logits: Tensor,
    teacher: Tensor,
    batch: TaskBatch,
    head: Head,
    temperature: float,
    class_weights: Tensor | None = None,
) -> Tensor:
    """How far the logits are from a teacher's, summed over what has a label, as the task's loss is.

    Classes, choices, tags and span ends: the Kullback-Leibler divergence of the distributions at a temperature T, times
    T^2, so that its gradient does not depend on T (Hinton et al., arXiv 1503.02531, section 2). Several labels: the
    same for each label's two outcomes, averaged. Regression: the mean squared difference.

    Args:
        logits, teacher: ``[R, C]``.
        batch: the micro batch.
        head: of the task.
        temperature: T.
        class_weights: float32 ``[C]``, how much classes and tags count, as in the task's loss; None for all alike.

    Returns:
        A float32 scalar.
    """
    logits, teacher = logits.float(), teacher.float()
    counted = label_weights(batch, head, class_weights)
    if head.problem == "regression":
        return ((logits - teacher).square().mean(dim=1) * counted).sum()
    if head.problem == "multi_label_classification":
        pairs = [
            torch.stack((F.logsigmoid(x / temperature), F.logsigmoid(-x / temperature)), 2) for x in (logits, teacher)
        ]
        return temperature**2 * (_divergence(*pairs).mean(dim=1) * counted).sum()
    if head.kind == "span":
        ends = [(batch.by_unit(logits[:, end]), batch.by_unit(teacher[:, end])) for end in (0, 1)]
        return sum(_scaled(mine, theirs, counted, temperature) for mine, theirs in ends) / 2  # type: ignore[return-value]
    if head.kind == "choice":
        logits, teacher = batch.by_unit(logits.squeeze(1)), batch.by_unit(teacher.squeeze(1))
    return _scaled(logits, teacher, counted, temperature)


def _scaled(logits: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
    mine, theirs = (torch.log_softmax(x / temperature, dim=1) for x in (logits, teacher))
    return temperature**2 * (_divergence(mine, theirs) * counted).sum()


def _divergence(mine: Tensor, theirs: Tensor) -> Tensor:
    """Over the last dimension, of log probabilities; places that neither has (-inf) add nothing."""
    gap = torch.where(theirs == -torch.inf, 0.0, theirs - mine)
    return (theirs.exp() * gap).sum(dim=-1)
