# SPDX-License-Identifier: Apache-2.0
"""Exact matrix products of integers on floating-point units.

A float32 matrix product of integers is exact, in whatever order it sums, while every partial sum stays below 2^24 in
magnitude: products and sums are integers that float32 holds. That is bounded by the largest input times the sum of
magnitudes of a row of weights, so it is known before the product is computed. Where the bound is not met the product is
divided along the summed dimension into parts that meet it, which are added in float64. On every CPU this runs at the
speed of the float model; integer matrix products of PyTorch do so on few.

Gradients of integer tensors are those of the real values they stand for: where q stands for x = S q, ``q.grad`` is
dL/dx. Reshaping, selecting and adding tensors of one scale then need no attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert.ibert.bounds import EXACT
from megatron_bert.ibert.fixed_point import largest, quantize
from parallel.collectives import start_all_gather, start_all_reduce, start_reduce_scatter, wait
from parallel.mesh import TensorParallel
from parallel.sharding import local_tensor
from parallel.weight_gradients import WeightGradientQueue, accumulate_gradient, active_queue

#: Weights of a row that are all smaller are quantized as if this were the largest, which leaves its bias some bits.
_LEAST_WEIGHT = 2.0**-14


class IntegerWeight(NamedTuple):
    """A quantized matrix.

    Attributes:
        q: ``[N, K]`` integers carried in float32.
        scale: float32 ``[N]``, one for each row.
    """

    q: Tensor
    scale: Tensor


@torch.no_grad()
def quantize_weight(weight: Tensor, bits: int, tp: TensorParallel | None = None) -> IntegerWeight:
    """Rows divided by their largest magnitude / (2^(bits-1) - 1), and rounded; in float32.

    Args:
        weight: ``[N, K]``, this rank's part.
        bits: of a weight.
        tp: the handle, where rows are divided over the tensor ranks.
    """
    weight = weight.float()
    peak = weight.abs().amax(1)
    if tp is not None and tp.size > 1:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=tp.group)
    scale = peak.clamp_(min=_LEAST_WEIGHT) / largest(bits)
    return IntegerWeight(quantize(weight, scale[:, None], bits), scale)


def exactly(device: torch.device) -> torch.autocast:
    """A block whose products are in the type of their operands, whatever autocast is in force around it."""
    return torch.autocast(device.type, enabled=False)


def parts_needed(q: Tensor, largest_input: int) -> int:
    """Into how many parts of the summed dimension a product must be divided, to be exact in float32.

    Args:
        q: ``[N, K]`` integers.
        largest_input: largest magnitude of what they are multiplied with.
    """
    width = q.shape[1]
    if width * 127 * largest_input < EXACT:
        return 1
    parts = 1
    sums = q.abs()
    while parts < width:
        size = -(-width // parts)
        heaviest = max(float(part.sum(1).max()) for part in sums.split(size, dim=1))
        if heaviest * largest_input < EXACT:
            break
        parts *= 2
    return parts


def exact_product(x: Tensor, q: Tensor, largest_input: int) -> Tensor:
    """``x q^T`` without rounding.

    Args:
        x: ``[T, K]`` integers carried in float32, at most ``largest_input`` in magnitude.
        q: ``[N, K]`` integers carried in float32.
        largest_input: see above.

    Returns:
        ``[T, N]`` integers carried in float32, or in float64 where the product was divided.
    """
    with exactly(x.device):
        return _exact_product(x, q, parts_needed(q, largest_input))


def _exact_product(x: Tensor, q: Tensor, parts: int) -> Tensor:
    if parts == 1:
        return x @ q.t()
    size = -(-q.shape[1] // parts)
    total: Tensor | None = None
    for left, right in zip(x.split(size, dim=1), q.split(size, dim=1), strict=True):
        part = left @ right.t()
        total = part.double() if total is None else total.add_(part)
    assert total is not None
    return total


def exact_attended(numerators: Tensor, values: Tensor) -> Tensor:
    """Sums of numerator * value: ``[G, Q, K]`` times ``[G, K, D]``, exact as in :func:`exact_product`."""
    size = EXACT // (255 * 127) - 1
    with exactly(values.device):
        if numerators.shape[-1] <= size:
            return torch.bmm(numerators, values)
        parts = zip(numerators.split(size, dim=2), values.split(size, dim=1), strict=True)
        return torch.stack([torch.bmm(left, right).double() for left, right in parts]).sum(0)


class _Product(torch.autograd.Function):
    """``x q^T``, with the gradient of ``x w^T`` at the dequantized input and weight, which goes to the float weight.

    The weight's gradient is left in a queue where a schedule asks for it: see :mod:`parallel.weight_gradients`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        integers: IntegerWeight,
        input_scale: float,
        largest_input: int,
        owner: list[Tensor],
        queue: WeightGradientQueue | None,
    ) -> Tensor:
        ctx.save_for_backward(x, *integers)
        ctx.input_scale, ctx.dtype, ctx.owner, ctx.queue = input_scale, weight.dtype, owner, queue
        return exact_product(x, integers.q, largest_input)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        x, q, scale = ctx.saved_tensors
        gradient = gradient.float()

        def of_weight() -> Tensor:
            return (gradient.t() @ x).mul_(ctx.input_scale).to(ctx.dtype)

        weight_gradient = None
        if ctx.queue is not None:
            ctx.queue.push(lambda: accumulate_gradient(ctx.owner[0], of_weight()))
        elif ctx.needs_input_grad[1]:
            weight_gradient = of_weight()
        of_input = gradient @ (q * scale[:, None]) if ctx.needs_input_grad[0] else None
        return of_input, weight_gradient, None, None, None, None, None


def integer_product(
    x: Tensor, weight: Tensor, integers: IntegerWeight, *, input_scale: float, largest_input: int
) -> Tensor:
    """Accumulators of a linear layer, before its bias.

    Args:
        x: ``[T, K]`` integers, scale ``input_scale``, at most ``largest_input`` in magnitude.
        weight: the float parameter, which gets the gradient.
        integers: its quantized local part, ``[N, K]``.
        input_scale, largest_input: see above.

    Returns:
        ``[T, N]`` integers, scale ``input_scale * integers.scale``.
    """
    queue = active_queue()
    local = local_tensor(weight)
    if queue is not None and x.requires_grad:
        return _Product.apply(x, local.detach(), integers, input_scale, largest_input, [weight], queue)
    return _Product.apply(x, local, integers, input_scale, largest_input, [], None)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, accumulators: Tensor, sequence: bool, size: int, group_name: str) -> Tensor:
        ctx.place = (sequence, size, group_name)
        integers = accumulators.int()
        if sequence:
            return wait(start_reduce_scatter(integers, size, group_name)).double()
        return wait(start_all_reduce(integers, group_name)).double()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        sequence, size, group_name = ctx.place
        if sequence:
            gradient = wait(start_all_gather(gradient.float(), size, group_name))
        return gradient, None, None, None


def sum_over_ranks(accumulators: Tensor, tp: TensorParallel) -> Tensor:
    """Sum the tensor ranks' accumulators as int32, before anything is rounded: the same bits at every tensor size.

    Args:
        accumulators: ``[T, N]``.
        tp: the handle.

    Returns:
        ``[T, N]``, or this rank's ``[T/t, N]`` under sequence parallelism; carried in float64 where ranks were summed.
    """
    if tp.size == 1:
        return accumulators
    return _SumOverRanks.apply(accumulators, tp.sequence, tp.size, tp.group_name)
