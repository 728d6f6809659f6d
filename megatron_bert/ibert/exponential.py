# SPDX-License-Identifier: Apache-2.0
"""2^-x in integers, for tanh.

I-BERT computes e^x by splitting off multiples of ln 2, which it rounds to a multiple of the input's scale (a bias of
0.45% at a scale of 0.01), and by a second-degree polynomial whose error is 1.9e-3. Here the argument already is in
units of log 2: its integer part is a shift, and only the fraction in [0, 1) needs a polynomial. Of degree 2 its error
is 1.5e-3; of degree 3, one multiplication more, 6.3e-5. Softmax has the same in 16 bits: see ``softmax.py``.
"""

from __future__ import annotations

from torch import Tensor

from megatron_bert.ibert.bounds import TANH_BITS

#: Fraction bits of the argument and of the result.
ARGUMENT_BITS, RESULT_BITS = 10, TANH_BITS
#: Largest argument that callers pass: the result is 0 from 16 on.
LARGEST_ARGUMENT = 31 << ARGUMENT_BITS
ONE = 1 << RESULT_BITS
#: The minimax cubic of 2^-f that is 1 at f = 0: times 2^15 (-0.691835, 0.231929, -0.040157).
_LINEAR, _SQUARE, _CUBE = -22670, 7600, -1316


def exponential(t: Tensor) -> Tensor:
    """2^(-t / 1024) with 15 fraction bits.

    Args:
        t: int32 or int64, 0 to 31 * 1024, scale 2^-10.

    Returns:
        The type of ``t``, 0 to 32768, scale 2^-15. Off by at most 1.3e-4 (4 steps); it never rises with ``t``. The
        widest intermediate has 26 bits.
    """
    whole = t >> ARGUMENT_BITS
    f = t & ((1 << ARGUMENT_BITS) - 1)
    h = ((f * _CUBE) >> ARGUMENT_BITS) + _SQUARE
    h = ((h * f) >> ARGUMENT_BITS) + _LINEAR
    return (((h * f) >> ARGUMENT_BITS) + ONE) >> whole
