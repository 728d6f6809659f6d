# SPDX-License-Identifier: Apache-2.0
"""The base of all settings, without what takes long to load."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from parallel.errors import ArgumentError

#: Magnitudes that float32 holds to its full precision: below them it may count as 0, above them it is infinite.
SMALLEST_FLOAT32, LARGEST_FLOAT32 = 1.18e-38, 3.4e38


class Section(BaseModel):
    """Settings that refuse unknown keys, numbers beyond float32 and truth values for numbers, and stay as read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes true for 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        parts = _parts(value) if get_origin(annotation) is dict or not isinstance(value, dict) else ()
        if any(isinstance(part, bool) for part in parts) and not _takes_bool(annotation):
            raise PydanticCustomError("truth", "true and false are not a value for it")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_empty_path(cls, value: Any, info: ValidationInfo) -> Any:
        """Which would be the current directory."""
        if value == "" and _takes_path(cls.model_fields[info.field_name or ""].annotation):
            raise PydanticCustomError("empty", "the path is empty: give one, or . for the current directory")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _within_float32(cls, value: Any) -> Any:
        """What is computed in float32 would be 0 or infinite there."""
        for part in _parts(value):
            if isinstance(part, float) and part and not SMALLEST_FLOAT32 <= abs(part) <= LARGEST_FLOAT32:
                raise PydanticCustomError(
                    "float32", f"it is computed with in float32, from {SMALLEST_FLOAT32:g} to {LARGEST_FLOAT32:g}"
                )
        return value


def _parts(value: Any) -> Iterable[Any]:
    """What a list or a mapping holds; else the value."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else [value]


def _takes_path(annotation: Any) -> bool:
    return annotation is Path or any(_takes_path(part) for part in get_args(annotation))


def _takes_bool(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(
        isinstance(part, bool) or _takes_bool(part) for part in get_args(annotation)
    )


def explained(error: ValidationError, kind: type[BaseModel]) -> ArgumentError:
    """The first of the mistakes that pydantic has found in settings, in a sentence that names the field."""
    first = _of_all_branches(error.errors(), kind)
    location = ".".join(str(part) for part in first["loc"])
    named = f"${location}" if location[:1].isalpha() else location
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1], kind)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return ArgumentError(f"unknown setting {named}; {hint}")
    if first["type"] == "missing":
        return ArgumentError(f"{named} is required and not set")
    if first["type"] == "value_error":
        cause = first["ctx"]["error"]
        return cause.within(location) if isinstance(cause, ArgumentError) else ArgumentError(str(cause))
    return ArgumentError(f"{named} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}")


def _of_all_branches(errors: list[Any], kind: type[BaseModel]) -> Any:
    """The first mistake; where a field takes one of several types, what is wrong with it for each of them together."""
    first = errors[0]
    if not first["loc"]:
        return first
    *field, branch = first["loc"]
    together = [each for each in errors if [*each["loc"][:-1]] == field and each["input"] is first["input"]]
    if len(together) == 1 or branch in _known_keys(tuple(field), kind):
        return first
    expected = [each["msg"].partition(", unable to")[0].removeprefix("Input should be ") for each in together]
    return {**first, "loc": tuple(field), "msg": f"input should be {' or '.join(expected)}"}


def _known_keys(location: tuple[Any, ...], kind: type[BaseModel]) -> list[str]:
    """Names of the fields of a section of settings."""
    for part in location:
        if (field := kind.model_fields.get(str(part))) is not None:
            kind = next(_models_in(field.annotation), kind)
    return [field.alias or name for name, field in kind.model_fields.items()]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
