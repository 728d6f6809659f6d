"""Softmax in integers: numerators of 8 bits relative to the row's largest, and their sum.

I-BERT divides first and rounds probabilities to 8 bits, so that attention spread over more than 256 keys rounds to
nothing. Here the numerators 0..255 go into the product with the values as they are, and the one division a row comes
after it: no mass is lost however flat the attention. The result needs no element-wise division either.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from megatron_bert.ibert.exponential import LARGEST_ARGUMENT, RESULT_BITS, exponential
from megatron_bert.ibert.fixed_point import Dyadic, reciprocal, requantise

#: Largest numerator, of the key with the largest score.
LARGEST_NUMERATOR = 255
#: Fraction bits of a weighted mean of values before it is requantised.
MEAN_BITS = 16
#: A row may have this many keys: sums of numerators are below 2^22, and of numerator * value below 2^29.
MOST_KEYS = 2**14


def softmax_numerators(scores: Tensor, factor: Dyadic, mask: Tensor | None) -> Tensor:
    """exp(score - largest score of the row), in 255ths.

    Args:
        scores: ``[.., K]``, |score| < 2^24: integers, or carried.
        factor: (scale of a score) * log2(e) * 2^10.
        mask: bool, broadcastable to ``scores``, true for keys that count; the others have part in neither maximum nor
            sum. None when all count.

    Returns:
        int32 ``[.., K]``, 0 to 255, and 0 where the mask says so. Off by at most 0.63 from 255 exp(..): 0.5 of
        rounding, 0.09 of the argument's 2^-11, 0.04 of the exponential. Outside :func:`requantise` the widest
        intermediate has 27 bits.
    """
    if mask is not None:
        scores = scores.masked_fill(~mask, -(2**24))
    distance = scores.amax(-1, keepdim=True) - scores
    numerators = _numerator(requantise(distance, factor, 0, LARGEST_ARGUMENT).int())
    return numerators if mask is None else numerators.masked_fill(~mask, 0)


def _numerator(argument: Tensor) -> Tensor:
    return (exponential(argument) * LARGEST_NUMERATOR + (1 << (RESULT_BITS - 1))) >> RESULT_BITS


@cache
def _table(device: torch.device) -> Tensor:
    """The numerators of arguments 0, 1, .. in float32."""
    return _numerator(torch.arange(LARGEST_ARGUMENT + 1, dtype=torch.int32, device=device)).float()


def carried_numerators(scores: Tensor, factor: Dyadic, mask: Tensor | None) -> Tensor:
    """What :func:`softmax_numerators` gives, for scores carried in float32 and by a table, which costs less.

    Args:
        scores, factor: as there.
        mask: float32, 1 for keys that count and 0 for others; None when all count.

    Returns:
        The numerators carried in float32.
    """
    seen = scores if mask is None else torch.add(scores, mask - 1.0, alpha=2.0**26)
    # In float64: the difference of two scores may have a bit more than float32 holds.
    distance = seen.amax(-1, keepdim=True).double() - seen.double()
    # NaN, of a model that diverges, has no integer, and no place in a table: it is for the trainer to find in the loss.
    argument = requantise(distance, factor, 0, LARGEST_ARGUMENT).int().clamp_(0, LARGEST_ARGUMENT)
    numerators = _table(scores.device).index_select(0, argument.flatten()).view(scores.shape)
    return numerators if mask is None else numerators.mul_(mask)


def inverse_sums(sums: Tensor) -> Dyadic:
    """The factor of :func:`weighted_mean`: 1 / sum with 16 fraction bits.

    Args:
        sums: int64, sums of numerators, below 2^22; of a row that attends to nothing 0, which counts as 1.
    """
    return reciprocal(sums.clamp(min=1)).shifted(MEAN_BITS)


def weighted_mean(products: Tensor, inverse: Dyadic) -> Tensor:
    """Sums of numerator * value divided by the sum of numerators, with 16 fraction bits.

    Args:
        products: ``[.., D]``, |product| <= 127 * sum < 2^29: integers, or carried.
        inverse: ``[.., 1]``, of :func:`inverse_sums`; a row that attends to nothing has products and a result of 0.

    Returns:
        Like :func:`requantise`, scale 2^-16, magnitude at most 127 * 2^16. The relative error is below 2^-22.
    """
    return requantise(products, inverse, -(2**23), 2**23)
