# SPDX-License-Identifier: Apache-2.0
"""Softmax in integers: numerators of 8 bits relative to the row's largest, and their sum.

I-BERT divides first and rounds probabilities to 8 bits, so that attention spread over more than 256 keys rounds to
nothing. Here the numerators 0..255 go into the product with the values as they are, and the one division per row comes
after it: no mass is lost however flat the attention. The result needs no element-wise division either.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_bert.ibert.fixed_point import Factor, bit_length, inverse_power, multiply_short

#: Largest numerator, of the key with the largest score.
LARGEST_NUMERATOR = 255
#: Fraction bits of the argument of 2^-t, and of 255 times its result.
ARGUMENT_BITS, _RESULT_BITS = 11, 7
#: Numerators of arguments from here on are 0.
_NOTHING = 9 << ARGUMENT_BITS
#: The minimax cubic of 255 * 2^7 * 2^-f, f with 15 fraction bits.
_ONE, _LINEAR, _SQUARE, _CUBE = LARGEST_NUMERATOR << _RESULT_BITS, -22579, 7562, -1305
_LARGEST_ARGUMENT = 2**16 - 1
#: Fraction bits of a mean before its last multiplication: see :func:`row_factor`.
_MEAN_GUARD = 4


class ScoreFactor(NamedTuple):
    """What takes the distance of a score from the row's largest to the argument: multiplier / 2^(16 + shift).

    Attributes:
        multiplier: 16 bits without sign.
        shift: -16 to 31, to the left below 0.
    """

    multiplier: int
    shift: int


def score_factor(scale: float) -> ScoreFactor:
    """The nearest.

    Args:
        scale: (scale of a score) * log2(e) * 2^11, above 0.
    """
    fraction, exponent = math.frexp(scale)
    multiplier = min(_LARGEST_ARGUMENT, math.floor(fraction * 2.0**16 + 0.5))
    return ScoreFactor(multiplier, min(max(-exponent, -16), 31))


def _numerator(argument: Tensor) -> Tensor:
    """255 * 2^(-argument / 2048), rounded; argument int32 or int64, 0 to 65535."""
    f = (argument & ((1 << ARGUMENT_BITS) - 1)) << 4
    h = multiply_short(f, _CUBE) + _SQUARE
    h = multiply_short(h, f) + _LINEAR
    whole = argument >> ARGUMENT_BITS
    return multiply_short(multiply_short(h, f) + _ONE, (whole * 0 + 256) >> whole)


def softmax_numerators(scores: Tensor, factor: ScoreFactor, mask: Tensor | None) -> Tensor:
    """exp(score - largest score of the row), in 255ths.

    Args:
        scores: int64 ``[.., K]``, |score| < 2^24.
        factor: of :func:`score_factor`.
        mask: bool, broadcastable to ``scores``, true for keys that count; the others have part in neither maximum nor
            sum. None when all count.

    Returns:
        int64 ``[.., K]``, 0 to 255, and 0 where the mask says so. Off by at most 0.7 from 255 exp(..): 0.5 of rounding,
        0.17 of the argument's two steps of 2^-11 at most, 0.02 of the exponential. No intermediate has more than 32
        bits.
    """
    if mask is not None:
        scores = scores.masked_fill(~mask, -(2**24))
    distance = scores.amax(-1, keepdim=True) - scores
    shift = factor.shift
    # Whatever is not 0 saturates with a shift of 16 to the left.
    narrow = distance >> shift if shift >= 0 else distance.clamp(max=_LARGEST_ARGUMENT) << -shift
    numerators = _numerator((narrow.clamp(max=_LARGEST_ARGUMENT) * factor.multiplier) >> 16)
    return numerators if mask is None else numerators.masked_fill(~mask, 0)


@cache
def _table(device: torch.device) -> Tensor:
    """The numerators of arguments 0, 1, .. in float32; the last is 0, as all that follow are."""
    return _numerator(torch.arange(_NOTHING + 1, dtype=torch.int32, device=device)).float()


def carried_numerators(scores: Tensor, factor: ScoreFactor, mask: Tensor | None) -> Tensor:
    """What :func:`softmax_numerators` gives, for scores carried in float32 and by a table, which costs less.

    Args:
        scores, factor: as there.
        mask: float32, 1 for keys that count and 0 for others; None when all count.

    Returns:
        The numerators carried in float32.
    """
    seen = scores if mask is None else torch.add(scores, mask - 1.0, alpha=2.0**26)
    # In float64: the difference of two scores may have a bit more than float32 holds, and the product has 32.
    distance = seen.amax(-1, keepdim=True).double() - seen.double()
    narrow = distance.mul_(2.0**-factor.shift).floor_().clamp_(max=_LARGEST_ARGUMENT)
    argument = narrow.mul_(factor.multiplier * 2.0**-16)
    # NaN, of a model that diverges, has no integer, and no place in a table: it is for the trainer to find in the loss.
    places = argument.clamp_(max=_NOTHING).int().clamp_(0, _NOTHING)
    numerators = _table(scores.device).index_select(0, places.flatten()).view(scores.shape)
    return numerators if mask is None else numerators.mul_(mask)


class MeanFactor(NamedTuple):
    """(scale of values) / (scale of the result) as multiplier * 2^(exponent - 15), for :func:`row_factor`.

    Attributes:
        multiplier: 2^14 to 32767.
        exponent: of the number as a fraction of 1/2 to 1 and a power of two.
    """

    multiplier: int
    exponent: int


def mean_factor(scale: float) -> MeanFactor:
    """The nearest to a number above 0."""
    fraction, exponent = math.frexp(scale)
    return MeanFactor(min(2**15 - 1, math.floor(fraction * 2.0**15 + 0.5)), exponent)


def row_factor(sums: Tensor, factor: MeanFactor) -> Factor:
    """What takes sums of numerator * value to the mean in steps of the result: factor / sum, by a division per row.

    Args:
        sums: int64, sums of numerators, below 2^22; of a row that attends to nothing 0, which counts as 1.
        factor: of :func:`mean_factor`.

    Returns:
        A multiplier of 9 to 11 bits. No intermediate but the dividend, 38 bits, has more than 31.
    """
    sums = sums.clamp(min=1)
    length = bit_length(sums)
    inverse = ((sums * 0 + 1) << (length + 15)) // sums
    return Factor((inverse * factor.multiplier) >> (16 + _MEAN_GUARD), length - (1 + _MEAN_GUARD) - factor.exponent)


def row_steps(number: Factor) -> tuple[Tensor, Tensor]:
    """A factor per row as float64: 2^-shift and multiplier / 2^15."""
    return inverse_power(number.shift.clamp(min=-64)), number.multiplier.double() * 2.0**-15
