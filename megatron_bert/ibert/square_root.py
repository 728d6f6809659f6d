# SPDX-License-Identifier: Apache-2.0
"""The integer square root."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_bert.ibert.fixed_point import bit_length

#: Newton steps that suffice for any argument below 2^62. The start is at most twice the root (relative error 1), and a
#: step takes a relative error e to e^2 / (2 + 2 e): 0.25, 0.025, 3e-4, 5e-8, 2e-15, the fifth below 2^-31; the sixth
#: settles the rounding. I-BERT says "at most four" for 32 bits, for which three in 300,000 numbers need six.
_STEPS = 6


def square_root(n: Tensor) -> Tensor:
    """floor(sqrt(n)), exact.

    Newton's method from above: x0 = 2^ceil(L / 2) of bit length L, x = (x + n // x) >> 1 while it falls. Whatever
    method a kernel uses, the result is the same.

    Args:
        n: int64, 0 to 2^62.

    Returns:
        int64, below 2^31. The widest intermediate is ``n``.
    """
    x = torch.ones_like(n) << ((bit_length(n) + 1) >> 1)
    for _ in range(_STEPS):
        x = torch.minimum(x, (x + n // x.clamp(min=1)) >> 1)
    return x
