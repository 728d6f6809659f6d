# SPDX-License-Identifier: Apache-2.0
"""What follows a matrix product: bias, requantization and activation, with straight-through gradients.

Each takes accumulators ``[T, N]`` and the bias as integers of the accumulators' scale, runs the integer function, and
in the backward pass the derivative of the real function at the rounded argument, times 1 where the result was not
clamped and 0 where it was. Gradients are those of real values: see :mod:`megatron_bert.ibert.products`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_bert.ibert import gelu as integer_gelu
from megatron_bert.ibert import tanh as integer_tanh
from megatron_bert.ibert.activations import IntegerActivation, all_results
from megatron_bert.ibert.blocks import blocks
from megatron_bert.ibert.fixed_point import (
    LARGEST_SHORT,
    Dyadic,
    Factor,
    carried,
    carried_short,
    factor,
    inverse_power,
    reading_factor,
)

#: Largest magnitude of a bias in accumulator units: with at most 12288 products of 255 * 127 the sum is below 2^29.
_LARGEST_BIAS = 2**27 - 1

#: Called with blocks of results before they are clamped, in units of their scale, and the rows they are.
Watch = Callable[[Tensor, slice], None]


class Target(NamedTuple):
    """Where a requantization goes: all that a quantizer gives a layer.

    Attributes:
        low, high: bounds of the integers.
        scale: the real value of one step.
        real: whether tensors hold the real values that the integers stand for, as those of the residual stream and
            logits do, whose scale is a power of two; else they carry the integers.
        watch: sees the integers before they are clamped; None where nobody does.
    """

    low: int
    high: int
    scale: float = 1.0
    real: bool = False
    watch: Watch | None = None

    @property
    def unit(self) -> float:
        """What the integers are multiplied with in a tensor."""
        return self.scale if self.real else 1.0


class Rescale(NamedTuple):
    """A requantization of accumulators with their bias, prepared: ``floor(a * step + constant)``, and the product.

    Attributes:
        step: float64 ``[N]`` or a scalar: 2^-shift, or without a multiplier the whole factor.
        constant: float64 ``[N]`` or a scalar; bias * step + 1/2.
        multiplier: float64 ``[N]`` or a scalar, multiplier / 2^15 of what is saturated to 16 bits before; None for a
            result that is wider, or exact.
    """

    step: Tensor
    constant: Tensor
    multiplier: Tensor | None

    def __call__(self, a: Tensor, rows: slice = slice(None)) -> Tensor:
        """A block of accumulators in the new scale, rounded and carried in float64."""
        if self.multiplier is None:
            return carried(a[rows], self.step, self.constant)
        return carried_short(a[rows], self.step, self.constant, self.multiplier)


@torch.no_grad()
def rescale(number: Factor | Dyadic, bias: Tensor | None, accumulator_scale: Tensor) -> Rescale:
    """Prepare a requantization.

    Args:
        number: accumulator scale / result scale.
        bias: float ``[N]`` of the layer, or None.
        accumulator_scale: float64 ``[N]``.
    """
    step = inverse_power(number.shift) if isinstance(number, Factor) else number.value()
    constant = torch.full_like(step, 0.5) if bias is None else integer_bias(bias, accumulator_scale) * step + 0.5
    return Rescale(step, constant, number.multiplier.double() * 2.0**-15 if isinstance(number, Factor) else None)


def exact_read(scale: float, device: torch.device) -> Rescale:
    """Real values to integers of a scale that is a power of two: one rounding."""
    step = torch.tensor(1.0 / scale, dtype=torch.float64, device=device)
    return Rescale(step, torch.full_like(step, 0.5), None)


def integer_bias(bias: Tensor, accumulator_scale: Tensor) -> Tensor:
    """``floor(bias / scale + 1/2)``, below 2^27 in magnitude; carried in float64."""
    return (bias.double() / accumulator_scale + 0.5).floor_().clamp_(-_LARGEST_BIAS, _LARGEST_BIAS)


def clamp_into(out: Tensor, kept: Tensor | None, rows: slice, rounded: Tensor, target: Target) -> None:
    """Clamp a block of integers into its place of the result, and note where nothing was clamped.

    Args:
        out: the result, float32.
        kept: of :func:`empty_mask`, for the whole result.
        rows: where the block stands in both.
        rounded: integers carried in float32 or float64. In float32 those above 2^24 lose digits, but none crosses a
            bound, which has at most 18 bits.
        target: of the result.
    """
    rounded = rounded.float()
    if target.watch is not None:
        target.watch(rounded, rows)
    clamped = torch.clamp(rounded, target.low, target.high, out=out[rows])
    if kept is not None:
        torch.eq(clamped, rounded, out=kept[rows])
    if target.unit != 1.0:
        clamped.mul_(target.unit)


def tracked(parameter: Tensor | None) -> Tensor | None:
    """A parameter, outside of autograd where no gradients are wanted: functions then keep nothing for them."""
    return parameter if parameter is None or torch.is_grad_enabled() else parameter.detach()


def empty_mask(ctx: Any, like: Tensor) -> Tensor | None:
    """Room for what the gradient is multiplied with where nothing was clamped (1) and where something was (0).

    None where there is no gradient. CPUs compare and multiply float32 six times as fast as they convert from and to
    bool; elsewhere the memory counts.
    """
    if not any(ctx.needs_input_grad):
        return None
    dtype = torch.float32 if like.device.type == "cpu" else torch.bool
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def _bias_gradient(ctx: Any, gradient: Tensor) -> Tensor | None:
    return gradient.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None


class _Requantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, bias: Tensor | None, prepared: Rescale, target: Target) -> Tensor:
        out = torch.empty(a.shape, dtype=torch.float32, device=a.device)
        kept = empty_mask(ctx, a)
        for rows in blocks(a):
            clamp_into(out, kept, rows, prepared(a, rows), target)
        ctx.save_for_backward(kept)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        gradient = gradient * ctx.saved_tensors[0]
        return gradient, _bias_gradient(ctx, gradient), None, None


def requantized(a: Tensor, bias: Tensor | None, prepared: Rescale, target: Target) -> Tensor:
    """Accumulators (or any real values) to integers of another scale.

    Args:
        a: ``[T, N]`` accumulators; or real values, with 1 / scale as the number that is prepared.
        bias: float ``[N]``, only for its gradient: ``prepared`` holds its integers. None without.
        prepared: of :func:`rescale`.
        target: of the result.

    Returns:
        ``[T, N]`` float32: integers, or multiples of ``target.unit``.
    """
    return _Requantize.apply(a, tracked(bias), prepared, target)


def quantized(x: Tensor, target: Target) -> Tensor:
    """Real values to integers.

    Where tensors hold real values, with a power of two as scale, it is one rounding: ``clamp(floor(x / scale + 1/2))``.
    Else it is a requantization by 1 / scale, whose shift takes real values, multiples of a power of two, to integers.
    """
    if target.unit != 1.0:
        return requantized(x, None, exact_read(target.scale, x.device), target)
    number = torch.tensor(1.0 / target.scale, dtype=torch.float64, device=x.device)
    return requantized(x, None, rescale(reading_factor(number), None, number), target)


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, bias: Tensor | None, scale: Tensor, bias_integers: Tensor | None) -> Tensor:
        ctx.bias_dtype = None if bias is None else bias.dtype
        return ((a if bias_integers is None else a + bias_integers) * scale).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        return gradient, _bias_gradient(ctx, gradient), None, None


def dequantized(a: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The real values that integers (with an integer bias) stand for.

    Args:
        a: integers.
        scale: float64, of a step; a scalar or ``[N]``.
        bias: float ``[N]``, rounded to the scale.
    """
    return _Dequantize.apply(a, bias, scale, None if bias is None else integer_bias(bias.detach(), scale))


class ActivationSteps(NamedTuple):
    """What follows the accumulators of an activation.

    Attributes:
        argument: to 16 bits of scale 2^-exponent.
        exponent: see above.
        result: from that scale to the result's.
    """

    argument: Rescale
    exponent: int
    result: Rescale


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, bias: Tensor | None, steps: ActivationSteps, target: Target, activation: IntegerActivation
    ) -> Tensor:
        out = torch.empty(a.shape, dtype=torch.float32, device=a.device)
        kept = empty_mask(ctx, a)
        argument = None if kept is None else torch.empty_like(out)
        bound, results = LARGEST_SHORT, None
        if a.numel() > 2 * bound:
            # There are no more arguments than these, and looking one up costs less than computing its result.
            results = steps.result(all_results(activation.function, steps.exponent, a.device)).float()
        for rows in blocks(a):
            x = steps.argument(a, rows)
            if argument is not None:
                torch.mul(x.float(), 2.0**-steps.exponent, out=argument[rows])
            if results is None:
                rounded = steps.result(activation.function(x.int(), steps.exponent).double())
            else:
                places = x.add_(bound).int().clamp_(0, 2 * bound)  # NaN has none: see softmax.carried_numerators
                rounded = results.index_select(0, places.flatten()).view(x.shape)
            clamp_into(out, kept, rows, rounded, target)
        ctx.save_for_backward(argument, kept)
        ctx.activation, ctx.bias_dtype = activation, None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        argument, kept = ctx.saved_tensors
        gradient = ctx.activation.backward(gradient * kept, argument)
        return gradient, _bias_gradient(ctx, gradient), None, None, None


def activation_steps(bias: Tensor | None, accumulator_scale: Tensor, target: Target) -> ActivationSteps:
    """Prepare an activation: arguments as in :func:`activation_requantized`."""
    device = accumulator_scale.device
    exponent = integer_gelu.argument_exponent(target.scale, of_stream=target.unit != 1.0)
    argument = rescale(factor(accumulator_scale * 2.0**exponent), bias, accumulator_scale)
    if target.unit != 1.0:
        return ActivationSteps(argument, exponent, exact_read(target.scale * 2.0**exponent, device))
    onward = torch.tensor(2.0**-exponent / target.scale, dtype=torch.float64, device=device)
    multiplier = (onward * 2.0**15 + 0.5).floor().clamp_(max=LARGEST_SHORT).long()
    return ActivationSteps(argument, exponent, rescale(Factor(multiplier, multiplier * 0), None, onward))


def activation_requantized(
    a: Tensor,
    bias: Tensor | None,
    accumulator_scale: Tensor,
    target: Target,
    activation: IntegerActivation,
) -> Tensor:
    """Bias, activation and requantization of accumulators ``[T, N]``.

    The argument is rounded to 16 bits, whose steps are 16 to 32 times as fine as those of an 8-bit result: where it
    saturates, so does the result.

    Args:
        a, bias: as in :func:`requantized`.
        accumulator_scale: float64 ``[N]``.
        target: of the result.
        activation: its integer function, and the gradient of the real one.
    """
    steps = activation_steps(None if bias is None else bias.detach(), accumulator_scale, target)
    return _Activation.apply(a, tracked(bias), steps, target, activation)


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, bias: Tensor | None, prepared: Rescale) -> Tensor:
        bound = integer_tanh.LARGEST_ARGUMENT
        argument = prepared(a).clamp_(-bound, bound).int()
        out = integer_tanh.tanh(argument).float().mul_(2.0**-integer_tanh.RESULT_BITS)
        ctx.save_for_backward(out)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (out,) = ctx.saved_tensors
        gradient = torch.ops.aten.tanh_backward(gradient, out)
        return gradient, _bias_gradient(ctx, gradient), None


def tanh_requantized(a: Tensor, bias: Tensor | None, accumulator_scale: Tensor) -> Tensor:
    """Bias and tanh of accumulators ``[N, H]``: multiples of 2^-15."""
    into = factor(accumulator_scale * integer_tanh.ARGUMENT_FACTOR)
    return _Tanh.apply(a, tracked(bias), rescale(into, bias, accumulator_scale))
