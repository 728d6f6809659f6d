# SPDX-License-Identifier: Apache-2.0
"""Layer norm in integers, in one pass over a row and with one division per row.

With N columns, s1 = sum x and s2 = sum x^2, the variance is V / N^2 for V = N s2 - s1^2, exactly, so nothing is lost to
rounding the mean. I-BERT rounds it, shifts by an amount that depends on the batch, drops epsilon, and divides the bias
by gamma, which gives the bias no gradient.

The deviation's bit length says by how much a row's N x - s1 is shifted to 16 bits, so that its elements keep the same
relative precision whatever the row's magnitude.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_bert.ibert.fixed_point import (
    LARGEST_SHORT,
    LEAST_SHORT,
    Factor,
    bit_length,
    inverse_power,
    multiply_short,
    rounding_shift,
    short,
)
from megatron_bert.ibert.square_root import square_root

#: Largest fraction bits of a result before its last shift, and magnitude of the offset there.
_LARGEST_SHIFT = 24
_LARGEST_OFFSET = 2**30 - 2**_LARGEST_SHIFT


class Affine(NamedTuple):
    """Gain and offset of a layer norm in integers.

    Attributes:
        gain: int64 ``[N]``, 16 bits.
        offset: int64 ``[N]``, below 2^30 in magnitude.
        shift: int64 scalar, of the result: 1 to 24.
    """

    gain: Tensor
    offset: Tensor
    shift: Tensor


def normal_bits(columns: int) -> int:
    """Fraction bits of a normalized element, which is below sqrt(N): 16 bits hold it. 9 of 257 to 1024 columns."""
    return 14 - -(-(columns - 1).bit_length() // 2)


def affine(weight: Tensor, bias: Tensor, scale: Tensor) -> Affine:
    """Gain ``floor(weight / scale * 2^(shift-f) + 1/2)`` and offset ``floor(bias / scale * 2^shift + 1/2)``.

    f is that of :func:`normal_bits`, and the shift the largest up to 24 with which gains have 16 bits and offsets 30.

    Args:
        weight, bias: ``[N]``.
        scale: float64, of the result.
    """
    bits = normal_bits(weight.shape[0])
    gains, offsets = weight.double() / scale, bias.double() / scale
    of_gain, of_offset = (torch.frexp(t.abs().max())[1].long() for t in (gains, offsets))
    shift = torch.minimum(15 - of_gain + bits, 30 - of_offset).clamp(1, _LARGEST_SHIFT)
    gain = (gains * inverse_power(bits - shift) + 0.5).floor_().clamp_(-LARGEST_SHORT, LARGEST_SHORT)
    offset = (offsets * inverse_power(-shift) + 0.5).floor_().clamp_(-_LARGEST_OFFSET, _LARGEST_OFFSET)
    return Affine(gain.long(), offset.long(), shift)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of x and of x^2, ``[.., 1]`` each.

    Args:
        x: ``[.., N]`` of 16 bits, with N |x| at most 2^28: int64, or carried in float64.

    Returns:
        Like ``x``. The squares are below 2^43.
    """
    return x.sum(-1, keepdim=True), (x * x).sum(-1, keepdim=True)


def deviation(total: Tensor, squares: Tensor, columns: int, epsilon: Tensor) -> Tensor:
    """N times the standard deviation: ``max(1, floor(sqrt(N squares - total^2 + epsilon)))``.

    Args:
        total, squares: int64 ``[.., 1]``, of :func:`moments`, converted if they are carried.
        columns: N.
        epsilon: int64, floor(eps * N^2 / scale(x)^2 + 1/2), at most 2^60.

    The widest intermediate has 62 bits: (N |x|)^2 and epsilon are the terms.
    """
    return square_root(squares * columns - total * total + epsilon).clamp(min=1)


def row_factor(deviations: Tensor, columns: int) -> Factor:
    """What takes N x - s1 to a normalized element, by one division per row: shift, and 2^(L+14) // deviation.

    Args:
        deviations: int64, 1 to 2^30; L is their bit length.
        columns: N.

    Returns:
        A multiplier of 15 bits. The dividend has up to 46.
    """
    length = bit_length(deviations)
    multiplier = (((deviations * 0 + 1) << (length + 14)) // deviations).clamp(max=LARGEST_SHORT)
    return Factor(multiplier, length - 1 - normal_bits(columns))


def normalized(x: Tensor, total: Tensor, number: Factor, columns: int) -> Tensor:
    """(x - mean) / standard deviation with the fraction bits of :func:`normal_bits`; 16 bits.

    Args:
        x: int64 ``[.., N]``, 16 bits, N |x| at most 2^28.
        total: ``[.., 1]``.
        number: of :func:`row_factor`.
        columns: N.
    """
    return multiply_short(short(rounding_shift(x * columns - total, number.shift)), number.multiplier)


def carried_normalized(x: Tensor, total: Tensor, number: Factor, columns: int) -> Tensor:
    """What :func:`normalized` gives, for ``x`` and ``total`` carried in float64."""
    step = inverse_power(number.shift)
    narrow = (x * columns).sub_(total).mul_(step).add_(0.5).floor_().clamp_(LEAST_SHORT, LARGEST_SHORT)
    return narrow.mul_(number.multiplier.double() * 2.0**-15).add_(0.5).floor_()


def scaled(normal: Tensor, parameters: Affine) -> Tensor:
    """``(normal * gain + offset + 2^(shift-1)) >> shift``: 31 bits at most; carried in float64 if ``normal`` is."""
    shift = parameters.shift
    half = (shift * 0 + 1) << (shift - 1)
    if normal.is_floating_point():
        step = inverse_power(shift)
        return torch.addcmul((parameters.offset + half) * step, normal, parameters.gain * step).floor_()
    return (normal * parameters.gain + parameters.offset + half) >> shift


def layer_norm(x: Tensor, epsilon: Tensor, parameters: Affine, limit: int) -> Tensor:
    """Layer norm of rows.

    Args:
        x: int64 ``[.., N]``, 16 bits, N |x| at most 2^28.
        epsilon: as in :func:`deviation`.
        parameters: gain and offset.
        limit: largest magnitude of the result.

    Returns:
        int64 ``[.., N]``. Before the clamp it is within 0.51 + (0.5 + 2^-9 |normalized|) of a gain's step of the real
        function: half a step of rounding, and two steps of a normalized element's last bit at most, times the gain. A
        row of equal elements gives its bias.
    """
    total, squares = moments(x)
    number = row_factor(deviation(total, squares, x.shape[-1], epsilon), x.shape[-1])
    return scaled(normalized(x, total, number, x.shape[-1]), parameters).clamp(-limit, limit)
