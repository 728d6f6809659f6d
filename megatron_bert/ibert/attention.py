# SPDX-License-Identifier: Apache-2.0
"""Attention of integers, with the gradient of the real function.

Shapes: G sequences times heads, Q queries, K keys, D head dimension.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_bert.ibert.blocks import blocks
from megatron_bert.ibert.bounds import HEAD_DIMENSIONS, MOST_KEYS
from megatron_bert.ibert.epilogues import Target, clamp_into, empty_mask
from megatron_bert.ibert.fixed_point import carried_short
from megatron_bert.ibert.products import exact_attended, exactly
from megatron_bert.ibert.softmax import (
    ARGUMENT_BITS,
    carried_numerators,
    mean_factor,
    row_factor,
    row_steps,
    score_factor,
)
from parallel.errors import UserError
from parallel.recording import values_unknown

#: What is added to a score at least, for a key not to be attended to beside others.
_HIDDEN = -1e3
#: What makes all keys of a query alike: their scores vanish beside it in float32.
_LOWEST = -1e30


class AttentionScales(NamedTuple):
    """Real values of one step of what attention reads."""

    query: float
    key: float
    value: float


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kept: Tensor | None,
        keep_factor: float,
        scales: AttentionScales,
        target: Target,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dim = query.shape[-1]
        with exactly(query.device):
            scores = torch.bmm(query, key.transpose(1, 2))
        numerators = torch.empty_like(scores)
        factor = score_factor(scales.query * scales.key * argument_factor(dim))
        for rows in blocks(scores):
            own = None if mask is None else mask[rows].float()
            numerators[rows].copy_(carried_numerators(scores[rows], factor, own))
        sums = numerators.sum(-1, keepdim=True)  # below 2^22, so exact
        products = exact_attended(numerators if kept is None else numerators * kept, value)
        out = torch.empty_like(query)
        inside = empty_mask(ctx, query)
        means = row_factor(sums.long(), mean_factor(scales.value * keep_factor / target.scale))
        step, multiplier = row_steps(means)
        half = step.new_full((), 0.5)
        for rows in blocks(out):
            rounded = carried_short(products[rows], step[rows], half, multiplier[rows])
            clamp_into(out, inside, rows, rounded, target)
        ctx.mark_non_differentiable(numerators, sums)
        ctx.save_for_backward(query, key, value, numerators, sums, kept, inside)
        ctx.scales, ctx.keep_factor = scales, keep_factor
        return out, numerators, sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None, None, None]:
        query, key, value, numerators, sums, kept, inside = ctx.saved_tensors
        scales: AttentionScales = ctx.scales
        gradient = gradient * inside
        probabilities = numerators / sums.clamp(min=1.0)
        of_probabilities = torch.bmm(gradient, (value * scales.value).transpose(1, 2))
        dropped = probabilities
        if kept is not None:
            dropped = (probabilities * kept).mul_(ctx.keep_factor)
            of_probabilities.mul_(kept).mul_(ctx.keep_factor)
        of_value = torch.bmm(dropped.transpose(1, 2), gradient)
        of_scores = torch._softmax_backward_data(of_probabilities, probabilities, -1, torch.float32)
        root = query.shape[-1] ** -0.5
        of_query = torch.bmm(of_scores, key * (scales.key * root))
        of_key = torch.bmm(of_scores.transpose(1, 2), query * (scales.query * root))
        return of_query, of_key, of_value, None, None, None, None, None


def argument_factor(dim: int) -> float:
    """What (scale of queries) * (scale of keys) is multiplied with to be the factor of softmax's argument."""
    return 2**ARGUMENT_BITS * math.log2(math.e) / math.sqrt(dim)


def only_hidden(mask: Tensor) -> Tensor | None:
    """Which keys may be attended to under a mask that is added to scores; None unless hiding is all that it does.

    It does so by -1000 and less. A query whose keys are all hidden would still prefer some to others, or attend to all,
    except by numbers beside which scores vanish.

    Args:
        mask: floating point, ``[.., K]``.

    Returns:
        Bool of the same shape.
    """
    if values_unknown():
        return None
    allowed, lowest = mask > _HIDDEN, max(_LOWEST, torch.finfo(mask.dtype).min)
    hides = ((mask == 0) | ~allowed).all() & (allowed.any(-1) | (mask <= lowest).all(-1)).all()
    return allowed if bool(hides) else None


def integer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scales: AttentionScales,
    target: Target,
    *,
    kept: Tensor | None = None,
    keep_factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v in integers.

    Args:
        query, key, value: ``[B, A, Q or K, D]`` integers of 8 bits.
        mask: bool ``[B, K]`` or broadcastable to ``[B, A, Q, K]``, true where a key may be attended to; a query without
            any has the result 0.
        scales: of query, key and value.
        target: of the result.
        kept: bool ``[B, A, Q, K]``, probabilities that dropout keeps.
        keep_factor: 1 / (1 - probability of dropout).

    Returns:
        ``[B, A, Q, D]`` integers of scale ``target.scale``; the numerators ``[B, A, Q, K]`` before dropout, and their
        sums ``[B, A, Q, 1]``.
    """
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    if dim > HEAD_DIMENSIONS or keys > MOST_KEYS:
        raise UserError(
            f"attention of head dimension {dim} to {keys} keys is not exact in integers: at most {HEAD_DIMENSIONS} "
            f"dimensions and {MOST_KEYS} keys are"
        )
    if mask is not None:
        mask = mask[:, None, None, :] if mask.dim() == 2 else mask
        mask = mask.expand(batch, heads, mask.shape[2], keys).reshape(batch * heads, mask.shape[2], keys)
    flat = [t.reshape(batch * heads, t.shape[2], dim).contiguous() for t in (query, key, value)]
    kept = None if kept is None else kept.reshape(batch * heads, queries, keys)
    out, numerators, sums = _Attention.apply(*flat, mask, kept, keep_factor, scales, target)
    result, above, below = (t.unflatten(0, (batch, heads)) for t in (out, numerators, sums))
    return result, above, below
