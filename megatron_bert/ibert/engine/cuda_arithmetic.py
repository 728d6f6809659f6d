# SPDX-License-Identifier: Apache-2.0
"""The specification's arithmetic as functions of Triton, in integers of 32 bits unless said otherwise.

There is no division: the compiler makes one of 32 or 64 bits from floating-point reciprocals. Quotients and roots come
bit by bit, once per row where there is no other way.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clamp(a, low, high):
    """``a`` within bounds."""
    return tl.minimum(tl.maximum(a, low), high)


@triton.jit
def multiply_short(n, m):
    """The short product ``(n m + 2^14) >> 15``."""
    return (n * m + 16384) >> 15


@triton.jit
def multiply_add(n, m, constant):
    """The short product plus a constant, which goes under the shift with it."""
    return (n * m + (16384 + constant * 32768)) >> 15


@triton.jit
def narrowed(a, shift):
    """``sat16(rs(a; shift))`` of an ``a`` below 2^30 and shifts from -15 to 30."""
    half = tl.where(shift > 0, 1 << tl.maximum(shift - 1, 0), 0)
    a = clamp((a + half) >> tl.maximum(shift, 0), -32768, 32767)
    return clamp(a << tl.maximum(-shift, 0), -32768, 32767)


@triton.jit
def read16(x, shift):
    """The stream, 16 bits, at another power of two; any shift."""
    return tl.maximum(narrowed(x, clamp(shift, -15, 20)), -32767)


@triton.jit
def read8(x, shift, multiplier, limit):
    """The stream, 16 bits, in 8; any shift."""
    return clamp(multiply_short(narrowed(x, clamp(shift, -15, 20)), multiplier), -limit, limit)


@triton.jit
def gelu(x, exponent):
    """GELU of 16 bits with ``exponent`` fraction bits."""
    cut = 7 << (exponent - 1)
    size = tl.minimum(tl.abs(x), cut)
    u = (cut - size) << (13 - exponent)
    h = multiply_add(u, -15097, 29496)
    h = multiply_add(h, u, -9868)
    h = multiply_add(h, u, 1655)
    quarter = multiply_short(multiply_short(h, u), u)
    return tl.maximum(x, 0) - multiply_short(size, quarter * 4)


@triton.jit
def numerators(distance, shift, multiplier):
    """Softmax numerators of distances from the largest score; ``multiplier`` is unsigned, and has 16 bits."""
    left = tl.maximum(-shift, 0)
    n = tl.minimum(distance >> tl.maximum(shift, 0), (65535 >> left) + 1) << left  # stays in 32 bits
    t = ((tl.minimum(n, 65535).to(tl.uint32) * multiplier) >> 16).to(tl.int32)
    f = (t & 2047) << 4
    h = multiply_add(f, -1305, 7562)
    h = multiply_add(h, f, -22579)
    h = multiply_add(h, f, 32640)
    return multiply_short(h, 256 >> (t >> 11))


@triton.jit
def bit_length(n):
    """How many bits an unsigned integer of 32 has."""
    length = (n > 0).to(tl.int32)
    for step in tl.static_range(5):
        large = (n >> (16 >> step)) > 0
        length += tl.where(large, 16 >> step, 0)
        n = tl.where(large, n >> (16 >> step), n)
    return length


@triton.jit
def power(n):
    """2^n, unsigned, n at most 31."""
    return (n * 0 + 1).to(tl.uint32) << n.to(tl.uint32)


@triton.jit
def quotient(high, low, divisor, BITS: tl.constexpr):
    """``(high 2^BITS + low) // divisor``, unsigned: low below 2^BITS, high below twice the divisor, that below 2^31."""
    result = (high >= divisor).to(tl.uint32)
    rest = high - tl.where(high >= divisor, divisor, 0)
    for bit in tl.static_range(BITS):
        rest = (rest << 1) | ((low >> (BITS - 1 - bit)) & 1)
        whole = rest >= divisor
        rest -= tl.where(whole, divisor, 0)
        result = (result << 1) | whole.to(tl.uint32)
    return result.to(tl.int32)


@triton.jit
def square_root(n):
    """``floor(sqrt(n))`` of an integer of 64 bits, 0 to 2^62 - 1."""
    root = n * 0
    for place in tl.static_range(31):
        trial = root + (1 << (60 - 2 * place))
        whole = n >= trial
        n -= tl.where(whole, trial, 0)
        root = (root >> 1) + tl.where(whole, 1 << (60 - 2 * place), 0)
    return root


@triton.jit
def tanh(t):
    """Tanh of -16384 to 16384, for the pooler."""
    size = tl.abs(t)
    f = size & 1023
    h = ((-1316 * f) >> 10) + 7600
    h = ((h * f) >> 10) - 22670
    decay = (((h * f) >> 10) + 32768) >> (size >> 10)
    lower = (32768 + decay).to(tl.uint32)
    half = lower >> 1
    upper = (32768 - decay).to(tl.uint32) + (half >> 15)
    result = tl.minimum(quotient(upper, half & 32767, lower, 15), 32767)
    return tl.where(t < 0, -result, result)
