# SPDX-License-Identifier: Apache-2.0
"""Losses of fine-tuning tasks, as sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bert.model.finetuning import TaskBatch
from megatron_bert.tasks.task import Head
from parallel.cross_entropy import IGNORED


def labeled(batch: TaskBatch, head: Head) -> Tensor:
    """Bool ``[U]`` (``[R]`` for a token head): which labels count."""
    labels = batch.labels
    if labels.is_floating_point():
        return ~labels.isnan().any(dim=1)
    return (labels != IGNORED).all(dim=1) if head.kind == "span" else labels != IGNORED


def label_weights(batch: TaskBatch, head: Head, class_weights: Tensor | None = None) -> Tensor:
    """``[U]`` (``[R]`` for a token head): how much each label counts, 0 where there is none.

    What the mean of a loss divides its sum by is their sum. Weights of a multi-label task are those of the outcomes of
    one text, which counts once.
    """
    counted = labeled(batch, head)
    if class_weights is None or batch.labels.is_floating_point():
        return counted
    return counted * class_weights[batch.labels.clamp(min=0)]


def task_loss_sum(logits: Tensor, batch: TaskBatch, head: Head, class_weights: Tensor | None = None) -> Tensor:
    """The loss summed over units (over tokens for a token head); those without a label add 0.

    Cross entropy over classes, choices or tags; for spans the mean of the start's and the end's over the tokens of the
    sequence; mean squared error for regression, and mean binary cross entropy over several labels.

    Args:
        logits: ``[R, C]``.
        batch: the micro batch.
        head: of the task.
        class_weights: float32 ``[C]`` for classes and tags, which the terms of their labels are multiplied by, and for
            several labels, where they multiply the terms of those that a text has; None leaves all at 1.

    Returns:
        A float32 scalar.
    """
    logits, labels = logits.float(), batch.labels
    if head.kind == "choice":
        return F.cross_entropy(batch.by_unit(logits.squeeze(1)), labels, ignore_index=IGNORED, reduction="sum")
    if head.kind == "span":
        ends = [
            F.cross_entropy(batch.by_unit(logits[:, end]), labels[:, end], ignore_index=IGNORED, reduction="sum")
            for end in (0, 1)
        ]
        return (ends[0] + ends[1]) / 2
    if not labels.is_floating_point():
        return F.cross_entropy(logits, labels, class_weights, ignore_index=IGNORED, reduction="sum")
    counted = labeled(batch, head)
    targets = labels.where(counted[:, None], torch.zeros_like(labels))
    if head.problem == "regression":
        each = F.mse_loss(logits, targets, reduction="none")
    else:
        each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=class_weights)
    return (each.mean(dim=1) * counted).sum()
