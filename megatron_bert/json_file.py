# SPDX-License-Identifier: Apache-2.0
"""JSON files that hold an object, as configurations do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parallel.errors import UserError, brief
from parallel.stored.file_range import FileRange
from parallel.stored.strange_files import refuse_strange

_LONGEST = 64 << 20


def read_object(path: Path, remedy: str = "fetch the file again") -> dict[str, Any]:
    """The object in a JSON file (UserError for anything else); ``remedy`` is what to do where it is not JSON."""
    return parse_object(path.read_bytes(), str(path), remedy)


def read_json(place: FileRange) -> dict[str, Any]:
    """The object in a JSON file of unknown origin, wherever it lies.

    Raises:
        UserError: it is not one.
    """
    if place.length > _LONGEST:
        raise UserError(f"{place.label} has {place.length:,} bytes, far too many for a file of settings: wrong file?")
    refuse_strange(place)
    return parse_object(place.content(), place.label)


def section(values: Mapping[str, Any] | None, *keys: str) -> dict[str, Any]:
    """The object under keys of nested ones; an empty one where it is not there, or something else is."""
    found: Any = values
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, dict) else {}


def parse_object(text: bytes, label: str, remedy: str = "fetch the file again") -> dict[str, Any]:
    """The object in a JSON text; ``label`` says what holds it.

    Raises:
        UserError: it is not JSON, or something else.
    """
    try:
        values = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{label} is not JSON ({brief(error, 80)}): {remedy}") from None
    if not isinstance(values, dict):
        raise UserError(f"{label} holds a JSON {type(values).__name__} instead of an object: wrong file?")
    return values
