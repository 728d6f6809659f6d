# SPDX-License-Identifier: Apache-2.0
"""Bounds of exact sums, and scales of what leaves the integer encoder, for all who read them; imports no torch."""

from __future__ import annotations

#: Fraction bits of logits.
LOGIT_BITS = 12
#: Fraction bits of tanh's results, the pooler's.
TANH_BITS = 15
#: Integers below this are exact in float32.
EXACT = 2**24
#: Most dimensions of a head, with which scores of 8 bits are exact in float32.
HEAD_DIMENSIONS = (EXACT - 1) // 127**2
#: A row of attention may have this many keys: sums of numerators are below 2^22, and of numerator * value below 2^29.
MOST_KEYS = 2**14
#: Layer norm is exact with N |x| < 2^28, an accumulator with 12288 products of 255 * 127.
LARGEST_ROW, MOST_PRODUCTS = 2**28, 12288
