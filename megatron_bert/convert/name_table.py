# SPDX-License-Identifier: Apache-2.0
"""A table of names: what the parameters of a format are called, beside the canonical names, for reading and writing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

KINDS = (".weight", ".bias")
_NUMBER = re.compile(r"(?<=\blayers\.)\d{1,6}\b|(?<=\blayer\.)\d{1,6}\b")


#: One name, or several for the projections of a fused matrix.
Names = str | tuple[str, ...]


class Place(NamedTuple):
    """Where the parameters of one of their modules are here.

    Attributes:
        owner: the module, or the parameter.
        part, parts: which of how many projections of a fused matrix they are.
    """

    owner: str
    part: int = 0
    parts: int = 1


class NameTable:
    """Names both ways.

    Args:
        rows: module or parameter here -> theirs; several for a fused matrix.
        stack: their name of the layers.
        layer: like rows, for what is in a layer.
        spelled: brings one of their names, as a file may spell it, to the spelling of the table or a shorter one.
    """

    def __init__(
        self,
        rows: Mapping[str, Names],
        stack: str,
        layer: Mapping[str, Names],
        spelled: Callable[[str], str],
    ) -> None:
        self._spelled = spelled
        self._theirs: dict[str, tuple[str, ...]] = {}
        inside = {
            f"encoder.layers.{{}}.{ours}": tuple(f"{stack}.{{}}.{name}" for name in _several(theirs))
            for ours, theirs in layer.items()
        }
        for ours, theirs in {**rows, **inside}.items():
            for end in ("",) if ours.endswith(KINDS) else KINDS:
                self._theirs[ours + end] = tuple(name + end for name in _several(theirs))
        self._places = {
            spelled(name): Place(ours, part, len(several))
            for ours, several in self._theirs.items()
            for part, name in enumerate(several)
        }

    def theirs(self, name: str) -> tuple[str, ...]:
        """Their name of a parameter: several for a fused matrix.

        Raises:
            KeyError: they have no such parameter.
        """
        template, number = _numbered(name)
        return tuple(theirs.replace("{}", number) for theirs in self._theirs[template])

    def ours(self, key: str) -> Place | None:
        """Where a parameter of theirs is here; None if it is unknown."""
        template, number = _numbered(self._spelled(key))
        place = self._places.get(template)
        return None if place is None else place._replace(owner=place.owner.replace("{}", number))


def _several(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _numbered(name: str) -> tuple[str, str]:
    """A name with ``{}`` for the number of its layer, and that number."""
    match = _NUMBER.search(name)
    return (name, "") if match is None else (f"{name[: match.start()]}{{}}{name[match.end() :]}", match[0])
