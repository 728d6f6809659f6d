# SPDX-License-Identifier: Apache-2.0
"""Fixed-point numbers: the symmetric quantizer, and requantization by 16-bit multipliers.

Integers are held in integer tensors, or *carried* in float32 or float64 tensors whose elements are all integers small
enough for every step to be exact. A carried requantization costs less than one in int64 and gives the same integers;
the bounds that this rests on are stated at each function, and tested.

The 16-bit product with rounding is one instruction on 32 elements (vpmulhrsw, sqrdmulh), where a 64-bit product of an
accumulator takes about ten on 16.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

#: Bits of the multiplier of a wide requantization. With accumulators below 2^29 every product stays below 2^52.
MULTIPLIER_BITS = 23
#: Largest magnitude of what is requantized: an accumulator with its bias.
LARGEST_ACCUMULATOR = 2**29 - 1
#: Largest shift of a wide requantization: half a unit, 2^(shift - 1), is added without leaving 53 bits.
LARGEST_SHIFT = 52

#: Bounds of 16 bits.
LEAST_SHORT, LARGEST_SHORT = -(2**15), 2**15 - 1
#: Bits that a narrowed accumulator keeps below the last of a result of 8 bits: its rounding then costs almost nothing.
GUARD_BITS = 4
#: Largest right shift of an accumulator; a smaller factor has a smaller multiplier.
LARGEST_NARROWING = 30
_POWERS = 128


@cache
def _powers(device: torch.device) -> Tensor:
    """2^-n for n from -128 to 128 in float64: exact, as a power function need not be on every device."""
    return torch.tensor([2.0**-n for n in range(-_POWERS, _POWERS + 1)], dtype=torch.float64, device=device)


def inverse_power(n: Tensor) -> Tensor:
    """2^-n of integers from -128 to 128, float64."""
    return _powers(n.device)[n.long() + _POWERS]


class Dyadic(NamedTuple):
    """A positive number multiplier / 2^shift.

    Attributes:
        multiplier: int64, at most 2^23; a scalar, or one per channel.
        shift: int64 of the same shape, 1 to 52.
    """

    multiplier: Tensor
    shift: Tensor

    def value(self) -> Tensor:
        """The number itself in float64, exact."""
        return self.multiplier.double() * inverse_power(self.shift)


class Factor(NamedTuple):
    """A positive number multiplier / 2^(15 + shift), applied in two steps: shift and saturate to 16 bits, multiply.

    Attributes:
        multiplier: int64, 0 to 32767; a scalar, or one per channel or row.
        shift: int64 of the same shape, at most 30; below 0 it shifts to the left.
    """

    multiplier: Tensor
    shift: Tensor


def largest(bits: int) -> int:
    """The largest magnitude of a symmetric signed integer of so many bits: 127 of 8; -128 is never used."""
    return 2 ** (bits - 1) - 1


def quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The symmetric quantizer: ``clamp(floor(x / scale + 1/2), -(2^(bits-1) - 1), 2^(bits-1) - 1)``.

    Args:
        x: values of any shape.
        scale: value of one step, broadcastable; the quotient and the sum are rounded to its type, float32 or float64.
        bits: of the result.

    Returns:
        Integers carried in the type of ``scale``. The error of what is not clamped is half a step.
    """
    limit = largest(bits)
    return (x.to(scale.dtype) / scale).add_(0.5).floor_().clamp_(-limit, limit)


def dyadic(scale: Tensor) -> Dyadic:
    """The nearest multiplier / 2^shift, ``2^22 <= multiplier < 2^23``: relative error at most 2^-23.

    Scales below 2^-30, with which hardly anything would not round to 0, have a shift of 52 and a smaller multiplier.
    Scales of 2^22 or more have a shift of 1 and the largest multiplier.

    Args:
        scale: float64, above 0.
    """
    fraction, exponent = torch.frexp(scale.double())
    multiplier = (fraction * 2.0**MULTIPLIER_BITS).add_(0.5).floor_()
    shift = MULTIPLIER_BITS - exponent.long()
    full = multiplier == 2.0**MULTIPLIER_BITS  # rounded up to the next power of two
    multiplier, shift = torch.where(full, multiplier / 2, multiplier), shift - full.long()
    coarse = (scale.double() * 2.0**LARGEST_SHIFT).add_(0.5).floor_()
    multiplier = torch.where(shift > LARGEST_SHIFT, coarse, multiplier)
    multiplier = torch.where(shift < 1, 2.0**MULTIPLIER_BITS - 1, multiplier)
    return Dyadic(multiplier.long(), shift.clamp(1, LARGEST_SHIFT))


def factor(scale: Tensor, guard: int = 0) -> Factor:
    """The multiplier and the shift of a requantization to 16 bits or fewer.

    Args:
        scale: float64, above 0.
        guard: bits that the narrowed integer keeps below the result's last; the multiplier has as many fewer than 15.

    Returns:
        A number nearest to ``scale`` of those with that shift. Factors of 2^-guard and more keep fewer guard bits, and
        those of 1 and more shift to the left.
    """
    scale = scale.double()
    exponent = torch.frexp(scale)[1].long()
    shift = -exponent - guard
    shift = torch.where(shift < 0, (-exponent).clamp(max=0), shift).clamp(1 - _POWERS, LARGEST_NARROWING)
    multiplier = (scale * inverse_power(-15 - shift)).add_(0.5).floor_().clamp_(max=LARGEST_SHORT)
    return Factor(multiplier.long(), shift)


def reading_factor(scale: Tensor) -> Factor:
    """The factor by which real values, multiples of a power of two, become integers of 8 bits or fewer.

    As :func:`factor`, but that the shift is whatever keeps the guard bits: it applies to the values themselves.

    Args:
        scale: float64, above 0: 1 / (scale of the integers).
    """
    shift = -torch.frexp(scale.double())[1].long() - GUARD_BITS
    multiplier = (scale.double() * inverse_power(-15 - shift)).add_(0.5).floor_()
    return Factor(multiplier.long(), shift)


def wide_requantize(a: Tensor, number: Dyadic, low: int, high: int) -> Tensor:
    """``clamp((a * multiplier + 2^(shift-1)) >> shift, low, high)``, for results of more than 16 bits: logits.

    Args:
        a: |a| < 2^29: any integer type.
        number: a scalar, or broadcastable.
        low, high: bounds of the result.

    Returns:
        int64. The widest intermediate, product and half a unit, has 53 bits.
    """
    one = number.multiplier * 0 + 1
    return ((a.long() * number.multiplier + (one << (number.shift - 1))) >> number.shift).clamp(low, high)


def rounding_shift(a: Tensor, shift: Tensor | int) -> Tensor:
    """``floor(a / 2^shift + 1/2)`` of int64; a shift to the left where ``shift`` is below 0."""
    if isinstance(shift, int):
        return (a + (1 << (shift - 1))) >> shift if shift > 0 else a << -shift
    down, up = shift.clamp(min=0), (-shift).clamp(min=0)
    return ((a << up) + ((down * 0 + 1) << down >> 1)) >> down


def short(a: Tensor) -> Tensor:
    """Saturated to 16 bits."""
    return a.clamp(LEAST_SHORT, LARGEST_SHORT)


def multiply_short(n: Tensor, multiplier: Tensor | int) -> Tensor:
    """``(n * multiplier + 2^14) >> 15`` of 16-bit integers, the multiplier at most 32767 in magnitude."""
    return (n * multiplier + (1 << 14)) >> 15


def requantize(a: Tensor, number: Factor, low: int, high: int) -> Tensor:
    """Shift with rounding, saturate to 16 bits, multiply with rounding, clamp: how integers change their scale.

    Args:
        a: |a| < 2^29: any integer type.
        number: a scalar, or broadcastable.
        low, high: bounds of the result.

    Returns:
        int64. No intermediate but of a shift to the left has more than 31 bits, and that is saturated to 16.
    """
    # A shift of 15 to the left saturates whatever is not 0.
    shift = number.shift.clamp(min=-15)
    return multiply_short(short(rounding_shift(a.long(), shift)), number.multiplier).clamp(low, high)


def carried(a: Tensor, step: Tensor, constant: Tensor) -> Tensor:
    """``floor(a * step + constant)`` in float64, exact where the sum has at most 53 bits.

    Args:
        a: carried in float32 or float64.
        step, constant: float64, broadcastable.
    """
    return torch.addcmul(constant, a.double(), step).floor_()


def carried_short(a: Tensor, step: Tensor, constant: Tensor, multiplier: Tensor) -> Tensor:
    """What :func:`requantize` gives before its clamp, carried: saturated ``floor(a * step + constant)``, multiplied.

    Args:
        a: carried in float32 or float64.
        step: float64, 2^-shift.
        constant: float64, 1/2; with a bias b, b * step + 1/2.
        multiplier: float64, multiplier / 2^15.
    """
    narrow = carried(a, step, constant).clamp_(LEAST_SHORT, LARGEST_SHORT)
    return narrow.mul_(multiplier).add_(0.5).floor_()


def bit_length(n: Tensor) -> Tensor:
    """How many bits an int64 of 0 or more has: 0 for 0, 3 for 4."""
    bits = torch.zeros_like(n)
    for step in (32, 16, 8, 4, 2, 1):
        upper = n >> step
        large = upper > 0
        bits = bits + large * step
        n = torch.where(large, upper, n)
    return bits + n
