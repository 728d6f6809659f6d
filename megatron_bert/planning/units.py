# SPDX-License-Identifier: Apache-2.0
"""Numbers for people, in the unit in which they are neither 0.0 nor thousands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Unit(NamedTuple):
    """A unit and how much it is."""

    name: str
    size: float

    def number(self, value: float, digits: int = 1) -> str:
        """A value in this unit, without its name; whole where the unit is as small as there are."""
        return f"{value / self.size:,.{digits if self.size > 1 else 0}f}"


#: From the largest down: of memory, of files and messages, and of operations.
BYTES = (Unit("GiB", 2**30), Unit("MiB", 2**20), Unit("KiB", 2**10), Unit("B", 1))
DECIMAL_BYTES = (Unit("GB", 1e9), Unit("MB", 1e6), Unit("kB", 1e3), Unit("B", 1))
OPERATIONS = (Unit("TFLOP", 1e12), Unit("GFLOP", 1e9), Unit("MFLOP", 1e6), Unit("FLOP", 1))


def unit_of(value: float, units: Sequence[Unit] = BYTES) -> Unit:
    """The largest unit that a value has one of; the smallest for nothing."""
    return next((unit for unit in units if abs(value) >= unit.size), units[-1] if value else units[0])


def with_unit(value: float, units: Sequence[Unit] = BYTES, digits: int = 1) -> str:
    """A value in its unit, such as ``5.3 MiB``."""
    unit = unit_of(value, units)
    return f"{unit.number(value, digits)} {unit.name}"


def parts_of(parts: Mapping[Any, float], unit: Unit) -> str:
    """Parts of something in its unit, the largest first, without those of next to nothing."""
    sizes = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{part} {unit.number(size, 2)}" for part, size in sizes if size >= unit.size / 200)


def short(value: float) -> str:
    """A number with two digits that count, or up to its last whole one: ``0.0021``, ``3.4``, ``1,234``."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 0.95 or not value else f"{value:.2g}"
