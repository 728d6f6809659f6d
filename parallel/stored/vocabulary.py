# SPDX-License-Identifier: Apache-2.0
"""What a pickle may name, and what becomes of the classes and functions that it names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from parallel.errors import brief


class RefusedError(Exception):
    """The pickle names something that must not be loaded; the message says what."""


@dataclass(frozen=True)
class Global:
    """The name of a class or function in a pickle: text, not the thing itself."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class StandIn:
    """What an object of a class that is not loaded leaves behind.

    Attributes:
        kind: the class, or the function that would have made the object with the arguments.
        state: the object was given afterwards, usually a dict of attributes.
        items: it was given afterwards: the elements of a list, queue or set, or the pairs of a dictionary.
    """

    kind: Global
    arguments: tuple[Any, ...]
    state: Any = None
    items: list[Any] | None = None

    def append(self, item: Any) -> None:
        """Take one more item."""
        self.extend([item])

    def extend(self, items: list[Any]) -> None:
        """Take more items."""
        if self.items is None:
            self.items = []
        self.items.extend(items)


@dataclass
class Vocabulary:
    """What a pickle may name.

    Attributes:
        values: names that stand for a value as they are, for example ``torch.float16``.
        calls: names that may be called, with what to do for the call.
        inert: starts of full names that become stand-ins.
        storage: what a persistent id stands for.
    """

    values: dict[str, Any] = field(default_factory=dict)
    calls: dict[str, Callable[..., Any]] = field(default_factory=dict)
    inert: tuple[str, ...] = ()
    storage: Callable[[Any], Any] | None = None

    def resolve(self, module: Any, name: Any) -> Any:
        """The value of a global.

        Raises:
            RefusedError: it is none of those above.
        """
        if not isinstance(module, str) or not isinstance(name, str):
            raise RefusedError("a class whose name is not text")
        full = f"{module}.{name}"
        if full in self.values:
            return self.values[full]
        if full in self.calls or full in _ENUMERATIONS or full.startswith(self.inert):
            return Global(module, name)
        raise RefusedError(brief(full))

    def call(self, function: Any, arguments: Any) -> Any:
        """Carry out a call, by the table or as a stand-in.

        Raises:
            RefusedError: what is called is not a global of this pickle, or is asked for an attribute of something else
                than a class.
        """
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise RefusedError("a call of something that is not a class")
        known = self.calls.get(str(function)) or _ENUMERATIONS.get(str(function))
        return StandIn(function, arguments) if known is None else known(*arguments)


def _member(function: str, kind: Any = None, name: Any = None, *others: Any) -> StandIn:
    """What a member of an enumeration leaves behind, which is the same as where its class was called with a value."""
    if not isinstance(kind, Global) or str(kind) in _ENUMERATIONS or not isinstance(name, str) or others:
        raise RefusedError(f"{function} of something that is not an enumeration")
    return StandIn(kind, (name,))


#: How the first releases of Python 3.11 (Debian 12 has one) pickle a member of an enumeration, by its class and name,
#: and several of one, as a call that stays a stand-in. Both can be in any pickle.
_ENUMERATIONS: dict[str, Callable[..., StandIn] | None] = {
    **{name: partial(_member, name) for name in ("builtins.getattr", "__builtin__.getattr")},
    **dict.fromkeys(("_operator.or_", "operator.or_")),
}
