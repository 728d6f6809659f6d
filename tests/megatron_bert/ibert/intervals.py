# SPDX-License-Identifier: Apache-2.0
"""Interval arithmetic: what integers an expression can take, and the widest of its intermediates.

An interval goes through the package's own functions in place of a tensor. Bounds are those of independent terms, so
they may be wider than what occurs, never narrower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Interval:
    """All integers from low to high; ``count`` is the number of columns that a sum runs over."""

    widest = 0

    def __init__(self, low: int, high: int, count: int = 1) -> None:
        assert low <= high
        self.low, self.high, self.count = low, high, count
        Interval.widest = max(Interval.widest, bits(low), bits(high))

    def _corners(self, other: object, operation) -> Interval:
        other = as_interval(other)
        values = [operation(a, b) for a in (self.low, self.high) for b in (other.low, other.high)]
        return Interval(min(values), max(values), self.count)

    def __add__(self, other):
        return self._corners(other, lambda a, b: a + b)

    def __sub__(self, other):
        return self._corners(other, lambda a, b: a - b)

    def __mul__(self, other):
        return self._corners(other, lambda a, b: a * b)

    def __rshift__(self, other):
        return self._corners(other, lambda a, b: a >> b)

    def __lshift__(self, other):
        return self._corners(other, lambda a, b: a << b)

    def __floordiv__(self, other):
        other = as_interval(other)
        assert other.low > 0
        return self._corners(other, lambda a, b: a // b)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self):
        return Interval(-self.high, -self.low, self.count)

    def __rsub__(self, other):
        return as_interval(other) - self

    def __and__(self, mask: int):
        assert self.low >= 0
        return Interval(0, min(self.high, mask))

    def abs(self):
        return Interval(0, max(abs(self.low), abs(self.high)))

    def sign(self):
        return Interval(-1, 1)

    def clamp(self, min=None, max=None):
        low = self.low if min is None else sorted((min, self.low, self.high))[1]
        high = self.high if max is None else sorted((max, self.low, self.high))[1]
        if min is not None and self.high < min:
            low = high = min
        if max is not None and self.low > max:
            low = high = max
        return Interval(low, high, self.count)

    def sum(self, dim, keepdim):
        return Interval(self.low * self.count, self.high * self.count)

    def amax(self, dim, keepdim):
        return Interval(self.high, self.high)

    def is_floating_point(self) -> bool:
        return False

    def long(self):
        return self

    def int(self):
        assert bits(self.low) <= 31
        assert bits(self.high) <= 31
        return self


def as_interval(value) -> Interval:
    return value if isinstance(value, Interval) else Interval(value, value)


def bits(value: int) -> int:
    """Bits of a magnitude: a signed integer of n + 1 bits holds those of n."""
    return value.bit_length() if value >= 0 else (~value).bit_length()


@contextmanager
def watched() -> Iterator[None]:
    """Begin a new count of the widest intermediate."""
    Interval.widest = 0
    yield
