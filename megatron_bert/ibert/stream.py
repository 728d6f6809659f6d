# SPDX-License-Identifier: Apache-2.0
"""The residual stream: integers of 16 bits (or fewer) whose scale is a power of two.

A tensor that leaves a module holds the real values n 2^-k, which float32 represents exactly, so that whatever stands
between the modules (pipeline stages, gathers over tokens, selections, additions of zeros) needs to know nothing of
scales. A module that reads the stream recovers the integers without knowing its writer's k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_bert.ibert import layer_norm as integer_norm
from megatron_bert.ibert.blocks import blocks
from megatron_bert.ibert.epilogues import Rescale, Target, clamp_into, empty_mask, exact_read, tracked
from megatron_bert.ibert.fixed_point import LARGEST_SHORT, Factor


class _AddToStream(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        a: Tensor,
        bias: Tensor | None,
        prepared: Rescale,
        target: Target,
        kept_of_part: Tensor | None,
        keep_factor: float,
    ) -> Tensor:
        out = torch.empty(stream.shape, dtype=torch.float32, device=a.device)
        inside = empty_mask(ctx, stream)
        read = exact_read(target.unit, a.device)
        for rows in blocks(out):
            part = prepared(a, rows)
            if kept_of_part is not None:
                part.mul_(kept_of_part[rows])
            before = read(stream, rows)
            if target.watch is not None:
                target.watch(part.float(), rows)
                target.watch(before.float(), rows)
            total = part.add_(before.clamp_(-LARGEST_SHORT, LARGEST_SHORT))
            clamp_into(out, inside, rows, total, target)
        ctx.save_for_backward(inside, kept_of_part)
        ctx.keep_factor, ctx.bias_dtype = keep_factor, None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None, None]:
        inside, kept_of_part = ctx.saved_tensors
        gradient = gradient * inside
        part = gradient
        if kept_of_part is not None:
            part = (gradient * kept_of_part).mul_(ctx.keep_factor)
        of_bias = part.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return gradient, part, of_bias, None, None, None, None


def added_to_stream(
    stream: Tensor,
    a: Tensor,
    bias: Tensor | None,
    prepared: Rescale,
    target: Target,
    *,
    kept: Tensor | None = None,
    keep_factor: float = 1.0,
) -> Tensor:
    """The residual sum: ``clamp(floor(stream / unit + 1/2) + requantized (a + b)) * unit``, both terms of 16 bits.

    Args:
        stream: ``[T, H]`` real values of the stream.
        a: ``[T, H]`` accumulators of the part that is added.
        bias: float ``[H]`` of that part, for its gradient.
        prepared: accumulator scale (times ``keep_factor``) / unit, with the bias.
        target: of the result; what watches it sees both terms too.
        kept: bool ``[T, H]``, elements of the part that dropout keeps; None without dropout.
        keep_factor: 1 / (1 - probability of dropout).
    """
    return _AddToStream.apply(stream, a, tracked(bias), prepared, target, kept, keep_factor)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        weight: Tensor,
        bias: Tensor,
        source: Target,
        eps: float,
        parameters: integer_norm.Affine,
        target: Target,
    ) -> Tensor:
        width = stream.shape[-1]
        out = torch.empty(stream.shape, dtype=torch.float32, device=stream.device)
        inside = empty_mask(ctx, stream)
        read = exact_read(source.unit, stream.device)
        epsilon = torch.tensor(epsilon_steps(eps, width, source.unit), device=stream.device)

        def integers(rows: slice) -> Tensor:
            return read(stream, rows).clamp_(source.low, source.high)

        # What is done once a row is done for all rows at once.
        sums = [integer_norm.moments(integers(rows)) for rows in blocks(stream)]
        totals, squares = (torch.cat(parts) for parts in zip(*sums, strict=True))
        deviations = integer_norm.deviation(totals.long(), squares.long(), width, epsilon)
        factors = integer_norm.row_factor(deviations, width)
        for rows in blocks(stream):
            own = Factor(factors.multiplier[rows], factors.shift[rows])
            normal = integer_norm.carried_normalized(integers(rows), totals[rows], own, width)
            result = integer_norm.scaled(normal, parameters)
            clamp_into(out, inside, rows, result, target)
        if inside is not None:
            mean = totals.mul(source.unit / width).float()
            inverse = deviations.double().reciprocal_().mul_(width / source.unit).float()
            ctx.save_for_backward(stream, weight, bias, inside, mean, inverse)
        return out

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None]:
        stream, weight, bias, inside, mean, inverse = ctx.saved_tensors
        of_stream, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
            gradient * inside,
            stream,
            list(weight.shape),
            mean,
            inverse,
            weight.float(),
            bias.float(),
            ctx.needs_input_grad[:3],
        )
        as_given = [None if g is None else g.to(p.dtype) for g, p in ((of_weight, weight), (of_bias, bias))]
        return of_stream, as_given[0], as_given[1], None, None, None, None


def epsilon_steps(eps: float, width: int, unit: float) -> int:
    """Epsilon of a layer norm in units of N^2 variance / unit^2."""
    return min(int(eps * width * width / unit**2 + 0.5), 2**60)


def normalized_stream(
    stream: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    source: Target,
    target: Target,
) -> Tensor:
    """Layer norm of the stream.

    Args:
        stream: ``[T, H]`` real values.
        weight, bias: ``[H]``.
        eps: added to the variance.
        source: what the stream is rounded to first; it already is, if its writer used the same.
        target: of the result.
    """
    step = torch.tensor(target.scale, dtype=torch.float64, device=stream.device)
    parameters = integer_norm.affine(weight.detach(), bias.detach(), step)
    return _LayerNorm.apply(stream, tracked(weight), tracked(bias), source, eps, parameters, target)
