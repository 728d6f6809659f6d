"""Layer norm in integers, in one pass over a row and with one division a row.

With N columns, s1 = sum x and s2 = sum x^2, the variance is V / N^2 for V = N s2 - s1^2, exactly, so nothing is lost to
rounding the mean. I-BERT rounds it, shifts by an amount that depends on the batch, drops epsilon, and divides the bias
by gamma, which gives the bias no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from megatron_bert.ibert.fixed_point import Dyadic, carried, reciprocal, requantise
from megatron_bert.ibert.square_root import square_root

#: Fraction bits of a normalised element. It is below sqrt(N), so 18 bits and a sign hold it for N up to 4096.
NORMAL_BITS = 12
LARGEST_NORMAL = 2**18 - 1
_LARGEST_GAIN, _LARGEST_OFFSET = 2**24 - 1, 2**30


class Affine(NamedTuple):
    """Gain and offset of a layer norm in integers.

    Attributes:
        gain: int64 ``[N]``, below 2^24 in magnitude.
        offset: int64 ``[N]``, at most 2^30 in magnitude.
        shift: of the result.
    """

    gain: Tensor
    offset: Tensor
    shift: int


def affine(weight: Tensor, bias: Tensor, scale: Tensor, bits: int) -> Affine:
    """Gain ``floor(weight / scale * 2^g + 1/2)`` and offset ``floor(bias / scale * 2^(12+g) + 1/2)``.

    g is 8 for results of 8 bits and 3 for wider ones, so that the offset fits in 32 bits.

    Args:
        weight, bias: ``[N]``.
        scale: float64, of the result.
        bits: of the result.
    """
    gain_bits = 8 if bits <= 8 else 3
    shift = NORMAL_BITS + gain_bits
    gain = (weight.double() / scale * 2.0**gain_bits + 0.5).floor_().clamp_(-_LARGEST_GAIN, _LARGEST_GAIN)
    offset = (bias.double() / scale * 2.0**shift + 0.5).floor_().clamp_(-_LARGEST_OFFSET, _LARGEST_OFFSET)
    return Affine(gain.long(), offset.long(), shift)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of x and of x^2, ``[.., 1]`` each.

    Args:
        x: ``[.., N]`` with N |x| < 2^28: int64, or carried in float64 where |x| < 2^17 and N < 2^19.

    Returns:
        Like ``x``. The squares are below 2^56 in int64, and below 2^53 where they are carried.
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


def normalised(x: Tensor, total: Tensor, inverse: Dyadic, columns: int) -> Tensor:
    """(x - mean) / standard deviation with 12 fraction bits: rq(N x - total; inverse * 2^12).

    Args:
        x: ``[.., N]``, N |x| < 2^28: int64, or carried in float64.
        total: ``[.., 1]`` of the same type.
        inverse: the reciprocal of the deviation.
        columns: N.

    Returns:
        Like ``x``, magnitude below 2^18. The widest intermediate has 53 bits.
    """
    return requantise(x * columns - total, inverse.shifted(NORMAL_BITS), -LARGEST_NORMAL, LARGEST_NORMAL)


def scaled(normal: Tensor, parameters: Affine) -> Tensor:
    """``(normal * gain + offset + 2^(shift-1)) >> shift``, carried if ``normal`` is; at most 43 bits."""
    shift = parameters.shift
    if normal.is_floating_point():
        step = 2.0**-shift
        offset = (parameters.offset + (1 << (shift - 1))).double()
        return carried(normal, parameters.gain.double() * step, offset * step)
    return (normal * parameters.gain + parameters.offset + (1 << (shift - 1))) >> shift


def layer_norm(x: Tensor, epsilon: Tensor, parameters: Affine, limit: int) -> Tensor:
    """Layer norm of rows.

    Args:
        x: int64 ``[.., N]``, N |x| < 2^28.
        epsilon: as in :func:`deviation`.
        parameters: gain and offset.
        limit: largest magnitude of the result.

    Returns:
        int64 ``[.., N]``. Before the clamp it is within 0.501 + |normalised| / 2^(g+1) + gain / 4096 of the real
        function, the gain in steps of the result and g as in :func:`affine`: half a step of rounding, the rounded gain,
        and the 12 bits of a normalised element. A row of equal elements gives its bias.
    """
    total, squares = moments(x)
    inverse = reciprocal(deviation(total, squares, x.shape[-1], epsilon))
    return scaled(normalised(x, total, inverse, x.shape[-1]), parameters).clamp(-limit, limit)
