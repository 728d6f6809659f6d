# SPDX-License-Identifier: Apache-2.0
"""Mean losses of classification, which are 0 (not NaN) where every label is ignored."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bert.family.arguments import check_labels
from parallel.cross_entropy import IGNORED
from parallel.errors import UserError
from parallel.recording import values_unknown


def blanked(hidden: Tensor) -> Tensor:
    """Hidden states of 0 in place of others, to which gradients of 0 go back even where those are not finite."""
    return hidden.masked_fill(torch.ones((), dtype=torch.bool, device=hidden.device), 0.0)


def mean_cross_entropy(
    name: str, logits: Tensor, labels: Tensor, blank: Callable[[], Tensor], ignored: int = IGNORED
) -> Tensor:
    """Mean cross entropy over the labels that are not ``ignored``, computed in float32.

    Where all are ignored, the loss and the gradients of the head are 0, even if hidden states are not finite, of which
    0 times as much would not be 0.

    Args:
        name: of the argument that gave the labels.
        logits: ``[N, C]``.
        labels: int64, N of them in any shape.
        blank: makes logits of hidden states of 0, in any shape.
        ignored: label of rows that do not count.

    Raises:
        UserError: labels of another number, type or range.
    """
    labels = labels.reshape(-1)
    check_labels(name, labels, (logits.shape[0],), logits.shape[1], ignored)
    counted = labels != ignored
    if not values_unknown() and not bool(counted.any()):
        return blank().float().sum() * 0.0 + 0.0  # which is never -0.0
    targets = labels.to(logits.device, torch.int64)
    total = F.cross_entropy(logits.float(), targets, ignore_index=ignored, reduction="sum")
    return total / counted.sum().clamp(min=1).to(total.device)


def problem_loss(problem: str | None, logits: Tensor, labels: Tensor, blank: Callable[[], Tensor]) -> Tensor:
    """The loss of a classification or regression problem.

    Args:
        problem: its type; None finds it: one class is a regression, whole-number labels are single, others multiple.
        logits: ``[B, C]``.
        labels: ``[B]`` or ``[B, 1]`` values (regression of one) or class numbers, ``[B, C]`` values (regression of
            several) or 0 and 1 (multiple labels).
        blank: as in mean_cross_entropy.

    Raises:
        UserError: labels of another shape or range.
    """
    batch, classes = logits.shape
    whole = not labels.is_floating_point()
    if problem is None:
        single = "single_label_classification" if whole else "multi_label_classification"
        problem = "regression" if classes == 1 else single
    if problem == "single_label_classification":
        if labels.numel() != batch or not whole:
            raise UserError(
                f"labels has shape {list(labels.shape)} and type {labels.dtype}, expected a class number for each of "
                f"{batch} sequences (problem_type is {problem})"
            )
        return mean_cross_entropy("labels", logits, labels, blank)
    if labels.shape != logits.shape and not (classes == 1 and labels.shape == (batch,)):
        raise UserError(
            f"labels has shape {list(labels.shape)}, expected {list(logits.shape)} (problem_type is {problem})"
        )
    targets = labels.reshape(logits.shape).to(logits.device, torch.float32)
    if problem == "regression":
        return F.mse_loss(logits.float(), targets)
    return F.binary_cross_entropy_with_logits(logits.float(), targets)
