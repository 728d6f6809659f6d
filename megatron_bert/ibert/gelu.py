"""GELU in integers.

GELU(x) = max(x, 0) - |x| Phi(-|x|). The second term is even, at most 0.17 and vanishes for large |x|, so it is a
polynomial in (c - |x|) with a double root at c, and 0 beyond. I-BERT's is of degree 2: off by 0.018, more than a step
of the 8-bit result (typically 0.015). What one can have at the same place, each a minimax fit (largest error):

| powers of (c - abs x) | 2 | 4 | 2, 3 | 2, 3, 4 | 2, 3, 4, 5 |
|---|---|---|---|---|---|
| I-BERT's class, refitted | 0.0163 | 0.0050 | 0.0059 | 0.0034 | 0.00091 |

The last is taken, with c = 3.5: three multiplications more than I-BERT's, all in 32 bits, and its error is about the
sixteenth part of a step. The tanh approximation of GELU, which some models are trained with, differs from GELU by up to
4.7e-4, so the same function serves both.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

#: Fraction bits of the argument (Q6.9 in 16 bits: -64 to 64) and of the result.
ARGUMENT_BITS, RESULT_BITS = 9, 24
LARGEST_ARGUMENT = 32767
#: c = 3.5 with 9 fraction bits.
_CUT = 1792
#: Of Phi(-|x|) = u^2 (b2 + b3 u + b4 u^2 + b5 u^3), u = (c - |x|) / 4, with 16 fraction bits.
_B2, _B3, _B4, _B5 = 13326, -79331, 236465, -120919
_U_BITS = 11
#: The least value of GELU is above -0.17, which zero points of its asymmetric quantiser leave room for.
LEAST = -0.17


def gelu(x: Tensor) -> Tensor:
    """GELU with 24 fraction bits.

    Args:
        x: int32 or int64, -32767 to 32767, scale 2^-9.

    Returns:
        The type of ``x``, scale 2^-24, magnitude below 2^30; 0 at 0. Off by at most 1e-3 from GELU of the rounded
        argument. The widest intermediate has 31 bits.
    """
    size = x.abs().clamp(max=_CUT)
    u = _CUT - size
    h = ((u * _B5) >> _U_BITS) + _B4
    h = ((h * u) >> _U_BITS) + _B3
    h = ((h * u) >> _U_BITS) + _B2
    h = (h * u) >> _U_BITS
    tail = (h * u + (1 << _U_BITS)) >> (_U_BITS + 1)  # Phi(-|x|) with 15 fraction bits
    return x.clamp(min=0) * (1 << (RESULT_BITS - ARGUMENT_BITS)) - size * tail


@cache
def table(device: torch.device) -> Tensor:
    """GELU of -32767 to 32767 in turn, carried in float64 ``[65535]``."""
    return gelu(torch.arange(-LARGEST_ARGUMENT, LARGEST_ARGUMENT + 1, dtype=torch.int32, device=device)).double()
