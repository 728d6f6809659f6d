# SPDX-License-Identifier: Apache-2.0
"""tanh in integers, for the pooler."""

from __future__ import annotations

import math

from torch import Tensor

from megatron_bert.ibert.exponential import ARGUMENT_BITS, ONE, RESULT_BITS, exponential

#: What an argument x of tanh is multiplied with to become that of :func:`tanh`: 2^10 * 2 log2(e).
ARGUMENT_FACTOR = 2**ARGUMENT_BITS * 2 * math.log2(math.e)
LARGEST_ARGUMENT = 16 << ARGUMENT_BITS
LARGEST = ONE - 1


def tanh(t: Tensor) -> Tensor:
    """Tanh as (1 - e) / (1 + e), e = 2^-|t|: one integer division per element.

    Args:
        t: int32 or int64, -16384 to 16384; stands for tanh of t / (2^10 * 2 log2 e).

    Returns:
        The type of ``t``, -32767 to 32767, scale 2^-15. Off by at most 1.1e-4 (4 steps); odd in ``t``. The widest
        intermediate has 30 bits.
    """
    decay = exponential(t.abs())
    upper, lower = ONE - decay, decay + ONE
    size = ((upper << RESULT_BITS) + (lower >> 1)) // lower
    return size.clamp(max=LARGEST) * t.sign()
