# SPDX-License-Identifier: Apache-2.0
"""GELU in integers of 16 bits.

GELU(x) = max(x, 0) - |x| Phi(-|x|). The second term is even, at most 0.17 and vanishes for large |x|, so Phi is a
polynomial in (c - |x|) with a double root at c, and 0 beyond. I-BERT's is of degree 2: off by 0.018, more than a step
of the 8-bit result (typically 0.015). What one can have at the same place, each a minimax fit (largest error):

| powers of (c - abs x) | 2 | 4 | 2, 3 | 2, 3, 4 | 2, 3, 4, 5 |
|---|---|---|---|---|---|
| I-BERT's class, refitted | 0.0163 | 0.0050 | 0.0059 | 0.0034 | 0.00091 |

The last is taken, with c = 3.5: three multiplications more than I-BERT's, each one instruction on 16-bit elements. The
tanh approximation of GELU, which some models are trained with, differs from GELU by up to 4.7e-4, so the same function
serves both.
"""

from __future__ import annotations

from math import frexp

from torch import Tensor

from megatron_bert.ibert.fixed_point import multiply_short

#: What fraction bits the argument may have.
EXPONENTS = range(1, 14)
#: Fraction bits the argument keeps below a step of an 8-bit result.
_GUARD_BITS = 4
#: Of Phi(-|x|) / 4 = u^2 (b2 + b3 u + b4 u^2 + b5 u^3), u = (c - |x|) / 4, with 15 fraction bits.
_B2, _B3, _B4, _B5 = 1655, -9868, 29496, -15097


def argument_exponent(scale: float, *, of_stream: bool = False) -> int:
    """Fraction bits of the argument of a GELU.

    Args:
        scale: of its result.
        of_stream: whether that has 16 bits, and a power of two as scale, which the argument then has too; else its
            steps are 16 to 32 times as fine.
    """
    wanted = frexp(1.0 / scale)[1] - 1 if of_stream else frexp(2.0**_GUARD_BITS / scale)[1]
    return min(max(wanted, EXPONENTS.start), EXPONENTS.stop - 1)


def gelu(x: Tensor, exponent: int) -> Tensor:
    """GELU with as many fraction bits as its argument.

    Args:
        x: int32 or int64, -32767 to 32767, scale 2^-exponent.
        exponent: 1 to 13.

    Returns:
        The type of ``x``, 16 bits; 0 at 0. Off by at most 0.0011 + 0.9 * 2^-exponent from GELU of the argument. Every
        intermediate that is kept has 16 bits, products and half a unit 31.
    """
    cut = 7 << (exponent - 1)
    size = x.abs().clamp(max=cut)
    u = (cut - size) << (EXPONENTS.stop - 1 - exponent)
    h = multiply_short(u, _B5) + _B4
    h = multiply_short(h, u) + _B3
    h = multiply_short(h, u) + _B2
    quarter = multiply_short(multiply_short(h, u), u)
    return x.clamp(min=0) - multiply_short(size, quarter * 4)
