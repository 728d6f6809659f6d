# SPDX-License-Identifier: Apache-2.0
"""Cross entropy over a vocabulary divided among tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.collectives import _functional, start_all_reduce, wait
from parallel.first_order import in_place
from parallel.mesh import TensorParallel

#: Label of a slot that takes no part in the loss.
IGNORED = -100


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Loss of each row from this rank's columns.

    loss = log sum exp(z) - z[label], with the maximum taken out for stability. Two reductions of K numbers each:
    the maximum, then the sum of exponentials and the label's logit together (each rank holds the label of some rows).
    Backward needs no communication: d loss / d z = softmax(z) - onehot(label), each rank for its own columns.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first_column: int, group_name: str) -> Tensor:
        columns = logits.shape[1]
        if columns:
            highest = logits.amax(dim=1)
        else:  # a rank that holds only padding
            highest = logits.new_full((logits.shape[0],), -torch.inf)
        highest = wait(_functional.all_reduce(highest, "max", group_name))
        exponentials = (logits - highest[:, None]).exp_()
        local_labels = labels - first_column
        owned = (local_labels >= 0) & (local_labels < columns)
        column = local_labels.masked_fill(~owned, 0)
        if columns:
            label_logit = logits.gather(1, column[:, None]).squeeze(1) - highest
            label_logit = label_logit.masked_fill(~owned, 0.0)
        else:
            label_logit = torch.zeros_like(highest)
        sums, label_logit = wait(start_all_reduce(torch.stack((exponentials.sum(dim=1), label_logit)), group_name))
        ignored = labels == IGNORED
        ctx.save_for_backward(exponentials.div_(sums[:, None]), column, owned, ignored)
        return (sums.log() - label_logit).masked_fill(ignored, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, column, owned, ignored = ctx.saved_tensors
        out = softmax
        if softmax.shape[1]:
            out = softmax.scatter_add(1, column[:, None], -owned.to(softmax.dtype)[:, None])
        return out * gradient.masked_fill(ignored, 0.0)[:, None], None, None, None


class _CrossEntropyInPlace(torch.autograd.Function):
    """Loss of each row from all columns. Logits become their probabilities, and those their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
        ignored = labels == IGNORED
        column = labels.masked_fill(ignored, 0)[:, None]
        logits[:, vocab_size:].fill_(-torch.inf)
        logarithms = torch.log_softmax(logits, dim=1, out=logits)
        losses = -logarithms.gather(1, column).squeeze(1)
        ctx.save_for_backward(logarithms.exp_(), column, ignored)
        return losses.masked_fill_(ignored, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        probabilities, column, ignored = ctx.saved_tensors
        each = gradient.masked_fill(ignored, 0.0)[:, None]
        return probabilities.mul_(each).scatter_add_(1, column, -each), None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, vocab_size: int, tp: TensorParallel, *, overwrite: bool = False
) -> Tensor:
    """Cross entropy of each row, computed in float32 whatever the type of the logits.

    Args:
        logits: ``[K, padded_vocab/t]``, this rank's columns. Columns of padding (global index >= ``vocab_size``) take
            no part in the softmax and get zero gradient, so the loss does not depend on the padding.
        labels: ``[K]`` global ids, the same on every rank; -100 is ignored (loss and gradient 0).
        vocab_size: V, number of real columns over all ranks.
        overwrite: whether nothing else reads the logits, which then may hold something else afterwards: one rank works
            in their memory where :func:`parallel.first_order.in_place` says so.

    Returns:
        ``[K]`` losses in float32, the same on every rank.
    """
    columns = logits.shape[1]
    first_column = tp.rank * columns
    real = max(0, min(columns, vocab_size - first_column))
    if overwrite and tp.size == 1 and in_place(logits):
        losses: Tensor = _CrossEntropyInPlace.apply(logits, labels, vocab_size)
        return losses
    logits = logits[:, :real].float()
    if tp.size == 1:
        return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    return _VocabParallelCrossEntropy.apply(logits, labels, first_column, tp.group_name)


@torch.no_grad()
def vocab_parallel_argmax(logits: Tensor, vocab_size: int, tp: TensorParallel) -> Tensor:
    """The most likely id of each row, ``[K]`` global ids on every rank; ties go to the lowest id.

    Args:
        logits: ``[K, padded_vocab/t]``, this rank's columns.
        vocab_size: V, number of real columns over all ranks.
    """
    columns = logits.shape[1]
    real = max(0, min(columns, vocab_size - tp.rank * columns))
    if tp.size == 1:
        return logits[:, :real].argmax(dim=1)
    if real:
        value, index = logits[:, :real].float().max(dim=1)
    else:
        value = logits.new_full((logits.shape[0],), -torch.inf, dtype=torch.float32)
        index = torch.zeros_like(value, dtype=torch.int64)
    index = index + tp.rank * columns
    highest = value.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=tp.group)
    candidate = index.masked_fill(value < highest, vocab_size)
    dist.all_reduce(candidate, op=dist.ReduceOp.MIN, group=tp.group)
    return candidate
