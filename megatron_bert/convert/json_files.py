# SPDX-License-Identifier: Apache-2.0
"""JSON of unknown origin."""

from __future__ import annotations

from typing import Any

from megatron_bert.json_file import parse_object
from parallel.errors import UserError
from parallel.stored.file_range import FileRange
from parallel.stored.strange_files import refuse_strange

_LONGEST = 64 << 20


def read_json(place: FileRange) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it is not one.
    """
    if place.length > _LONGEST:
        raise UserError(f"{place.label} has {place.length:,} bytes, far too many for a file of settings: wrong file?")
    refuse_strange(place)
    return parse_object(bytes(place.read(0, place.length)), place.label)


def integer(settings: dict[str, Any], key: str, label: str, default: int | None = None) -> int:
    """A positive integer among settings.

    Raises:
        UserError: it is missing, without a default, or is something else.
    """
    value = settings.get(key, default)
    if type(value) is not int or not 0 < value < 1 << 40:
        raise UserError(f"{label} gives no positive number as {key}: it is damaged or of another kind of model")
    return value


def fraction(settings: dict[str, Any], key: str, label: str, default: float) -> float:
    """A number in [0, 1) among settings.

    Raises:
        UserError: it is something else.
    """
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UserError(f"{label} gives {key} a value that is not a number in [0, 1): it is damaged")
    return float(value)
