# SPDX-License-Identifier: Apache-2.0
"""Attention written out on processors, with keyed dropout, a few heads at a time.

Passes over scores take as long there as the products do, so there are few, in memory that is there already.
Shapes: B sequences, A heads, S their length, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.dropout import keep_scale

#: Scores that are computed at once, 4 MiB. Smaller parts fit the caches, but cost more in calls than that saves.
_AT_ONCE = 1 << 20

#: Sequences and heads that are computed at once.
_Block = tuple[slice, slice]


def attention_in_place(
    projected: Tensor, mask: Tensor | None, dropout: float, keys: Tensor, positions: Tensor | None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v after dropout, where :func:`parallel.first_order.in_place` says so.

    A query without any key attends evenly to all.

    Args:
        projected: query, key and value, ``[B, S, A, 3, D]``.
        mask: bool ``[B, S]`` or ``[B, 1, S, S]``, true where a key may be attended to.
        dropout: of the probabilities, more than 0.
        keys: int64 ``[B, A, S]``, of dropout, for each query of each head.
        positions: int32 ``[B, S]``, what dropout calls the keys of attention; by default 0 to S - 1.

    Returns:
        ``[B, S, A, D]``.
    """
    masked = None if mask is None else ~(mask[:, None, None, :] if mask.dim() == 2 else mask)
    context: Tensor = _AttentionInPlace.apply(projected, masked, dropout, keys, positions)
    return context


class _AttentionInPlace(torch.autograd.Function):
    """P = softmax(q k^T / sqrt(D)), R = P * scale, y = R v, with the scale that dropout multiplies with.

    Backward: dv = R^T dy. The gradient of P times P is G = (dy v^T) * R, so that of the scores is G - P * rowsum(G):
    neither scores nor the mask of dropout are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, masked: Tensor | None, dropout: float, keys: Tensor, positions: Tensor | None
    ) -> Tensor:
        batch, length, heads, _, dim = projected.shape
        context = projected.new_empty(batch, length, heads, dim)
        probabilities, remaining = projected.new_empty(2, batch, heads, length, length)
        for block in _blocks(probabilities):
            query, key, value = _matrices(projected, block)
            scores = _product(query, key.transpose(1, 2), dim**-0.5)
            if masked is not None:
                _of_block(scores, block).masked_fill_(masked[block[0]], torch.finfo(scores.dtype).min)
            own, left = probabilities[block].flatten(0, 1), remaining[block].flatten(0, 1)
            torch.softmax(scores, dim=-1, out=own)
            columns = length if positions is None else positions[block[0], None, None, :]
            torch.mul(own, keep_scale(keys[block], columns, dropout).flatten(0, 1), out=left)
            context[block[0], :, block[1]] = _of_block(torch.bmm(left, value), block).transpose(1, 2)
        ctx.save_for_backward(projected, probabilities, remaining)
        ctx.masked = masked
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        projected, probabilities, remaining = ctx.saved_tensors
        found, factor = torch.empty_like(projected), projected.shape[-1] ** -0.5
        for block in _blocks(probabilities):
            query, key, value = _matrices(projected, block)
            above = gradient[block[0], :, block[1]].transpose(1, 2).flatten(0, 1)
            own, left = probabilities[block].flatten(0, 1), remaining[block].flatten(0, 1)
            scores = torch.bmm(above, value.transpose(1, 2)).mul_(left)
            scores.addcmul_(own, scores.sum(dim=-1, keepdim=True), value=-1)
            if ctx.masked is not None:  # of queries without any key
                _of_block(scores, block).masked_fill_(ctx.masked[block[0]], 0.0)
            parts = (
                _product(scores, key, factor),
                _product(scores.transpose(1, 2), query, factor),
                torch.bmm(left.transpose(1, 2), above),
            )
            for number, part in enumerate(parts):
                found[block[0], :, block[1], number] = _of_block(part, block).transpose(1, 2)
        return found, None, None, None, None


def _blocks(scores: Tensor) -> Iterator[_Block]:
    """Whole sequences at once, or some heads of one, of ``[B, A, S, S]``."""
    batch, heads, length, _ = scores.shape
    at_once = max(1, _AT_ONCE // max(1, length * length))
    sequences, own_heads = max(1, at_once // heads), min(at_once, heads)
    for first in range(0, batch, sequences):
        for head in range(0, heads, own_heads):
            yield slice(first, min(first + sequences, batch)), slice(head, min(head + own_heads, heads))


def _matrices(projected: Tensor, block: _Block) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a block, ``[heads, S, D]``."""
    own = projected[block[0], :, block[1]].permute(3, 0, 2, 1, 4).contiguous().flatten(1, 2)
    return own[0], own[1], own[2]


def _product(one: Tensor, other: Tensor, factor: float) -> Tensor:
    """Products of matrices, times a factor."""
    return torch.baddbmm(one.new_empty(1, 1, 1), one, other, beta=0, alpha=factor)


def _of_block(flat: Tensor, block: _Block) -> Tensor:
    """``[heads, ..]`` of a block as ``[sequences, heads of each, ..]``."""
    return flat.view(block[0].stop - block[0].start, -1, *flat.shape[1:])
