"""Fixed-point numbers: the symmetric quantiser, and requantisation by dyadic numbers.

Integers are held in integer tensors, or *carried* in float32 or float64 tensors whose elements are all integers small
enough for every step to be exact. A carried requantisation costs less than half of one in int64 and gives the same
integers; the bounds that this rests on are stated at each function, and tested.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

#: Bits of a multiplier. With accumulators below 2^29 every product stays below 2^52, so float64 holds it exactly.
MULTIPLIER_BITS = 23
#: Largest magnitude of what is requantised.
LARGEST_ACCUMULATOR = 2**29 - 1
#: Largest shift: half a unit, 2^(shift - 1), is added to a product without leaving 53 bits.
LARGEST_SHIFT = 52


@cache
def _inverse_powers(device: torch.device) -> Tensor:
    """2^-shift by shift, float64 ``[54]``: exact, as a power function need not be on every device."""
    return torch.tensor([2.0**-shift for shift in range(LARGEST_SHIFT + 2)], dtype=torch.float64, device=device)


class Dyadic(NamedTuple):
    """A positive number multiplier / 2^shift.

    Attributes:
        multiplier: int64, at most 2^23; a scalar, or one a channel or row.
        shift: int64 of the same shape, 1 to 52.
    """

    multiplier: Tensor
    shift: Tensor

    def value(self) -> Tensor:
        """The number itself in float64, exact."""
        return self.multiplier.double() * _inverse_powers(self.shift.device)[self.shift]

    def shifted(self, bits: int) -> Dyadic:
        """The number times 2^bits; its shift must stay in range."""
        return Dyadic(self.multiplier, self.shift - bits)


def largest(bits: int) -> int:
    """The largest magnitude of a symmetric signed integer of so many bits: 127 of 8; -128 is never used."""
    return 2 ** (bits - 1) - 1


def quantise(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The symmetric quantiser: ``clamp(floor(x / scale + 1/2), -(2^(bits-1) - 1), 2^(bits-1) - 1)``.

    Args:
        x: values of any shape.
        scale: value of one step, broadcastable; the division is rounded to its type, float32 or float64.
        bits: of the result.

    Returns:
        Integers carried in the type of ``scale``. The error of what is not clamped is half a step.
    """
    limit = largest(bits)
    return (x.to(scale.dtype) / scale).add_(0.5).floor_().clamp_(-limit, limit)


def dyadic(scale: Tensor) -> Dyadic:
    """The nearest multiplier / 2^shift, ``2^22 <= multiplier < 2^23``: relative error at most 2^-23.

    Scales below 2^-30, with which hardly anything would not round to 0, have a shift of 52 and a smaller multiplier.

    Args:
        scale: float64, above 0 and below 2^21.
    """
    fraction, exponent = torch.frexp(scale.double())
    multiplier = (fraction * 2.0**MULTIPLIER_BITS).add_(0.5).floor_()
    shift = MULTIPLIER_BITS - exponent.long()
    full = multiplier == 2.0**MULTIPLIER_BITS  # rounded up to the next power of two
    multiplier, shift = torch.where(full, multiplier / 2, multiplier), shift - full.long()
    small = shift > LARGEST_SHIFT
    coarse = (scale.double() * 2.0**LARGEST_SHIFT).add_(0.5).floor_()
    multiplier = torch.where(small, coarse, multiplier)
    return Dyadic(multiplier.long(), shift.clamp(max=LARGEST_SHIFT))


def requantise(a: Tensor, factor: Dyadic, low: int, high: int) -> Tensor:
    """``clamp((a * multiplier + 2^(shift-1)) >> shift, low, high)``: times a dyadic number, halves rounded up.

    The one way in which integers change their scale. The shift is arithmetic, so this is floor(a * factor + 1/2).

    Args:
        a: |a| < 2^29: any integer type, or carried.
        factor: a scalar, or broadcastable.
        low, high: bounds of the result.

    Returns:
        int64; carried in float64 if ``a`` was carried. The widest intermediate, product and half a unit, has 53 bits.
    """
    if a.is_floating_point():
        return carried(a, factor.value(), _half(a.device)).clamp_(low, high)
    one = factor.multiplier * 0 + 1
    return ((a.long() * factor.multiplier + (one << (factor.shift - 1))) >> factor.shift).clamp(low, high)


@cache
def _half(device: torch.device) -> Tensor:
    return torch.tensor(0.5, dtype=torch.float64, device=device)


def carried(a: Tensor, factor: Tensor, constant: Tensor) -> Tensor:
    """``floor(a * factor + constant)`` in float64, exact where the sum has at most 53 bits.

    With ``constant = b * factor + 1/2`` it is the requantisation of a + b before its clamp: factor is multiplier /
    2^shift, so both products and the sum are multiples of 2^-shift, and they stay below 2^(53 - shift).

    Args:
        a: carried in float32 or float64.
        factor, constant: float64, broadcastable.
    """
    return torch.addcmul(constant, a.double(), factor).floor_()


def bit_length(n: Tensor) -> Tensor:
    """How many bits an int64 of 0 or more has: 0 for 0, 3 for 4."""
    bits = torch.zeros_like(n)
    for step in (32, 16, 8, 4, 2, 1):
        upper = n >> step
        large = upper > 0
        bits = bits + large * step
        n = torch.where(large, upper, n)
    return bits + n


def reciprocal(n: Tensor) -> Dyadic:
    """1 / n by one integer division: ``multiplier = floor(2^(L+22) / n)``, shift L + 22, L = bit length of n.

    Args:
        n: int64, 1 to 2^30.

    Returns:
        ``2^22 < multiplier <= 2^23``; relative error below 2^-22. The dividend has up to 53 bits.
    """
    shift = bit_length(n) + (MULTIPLIER_BITS - 1)
    return Dyadic((torch.ones_like(n) << shift) // n, shift)
