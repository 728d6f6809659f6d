"""An interpreter of pickles that can build data and nothing else.

Python's own unpickler can be restricted too, but not as far as files of unknown origin ask for: an allowed class can
still be given attributes, a short file can make the C implementation fill memory with an empty memo table, and torch's
``weights_only`` reader stops at every class it does not know, among them ``argparse.Namespace`` and Megatron's own.
Here :mod:`pickletools` splits the stream into opcodes, and each opcode that only builds data is carried out below.
Names of classes become inert :class:`Global` values; calling one looks up what it stands for in a table, or makes an
inert :class:`StandIn`. No name is ever imported.
"""

from __future__ import annotations

import argparse
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from parallel.errors import UserError, brief

#: Opcodes after which a pickle is refused; the largest real ones (sharded optimizers) have a few million.
_MOST_OPCODES = 20_000_000
#: Longest single string, in bytes: tensors lie outside the pickle, random states are a few kilobytes.
_LONGEST = 64 << 20


class RefusedError(Exception):
    """The pickle names something that must not be loaded; the message says what."""


@dataclass(frozen=True)
class Global:
    """The name of a class or function in a pickle: text, not the thing itself."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class StandIn:
    """What an object of a class that is not loaded leaves behind.

    Attributes:
        kind: the class, or the function that would have made the object.
        arguments: it was called with.
        state: the object was given afterwards, usually a dict of attributes.
    """

    kind: Global
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass
class Vocabulary:
    """What a pickle may name.

    Attributes:
        values: names that stand for a value as they are, for example ``torch.float16``.
        calls: names that may be called, with what to do for the call.
        inert: starts of full names that become stand-ins.
        storage: what a persistent id stands for.
        copied: elements handed to calls so far; a short file could have a long list copied over and over.
    """

    values: dict[str, Any] = field(default_factory=dict)
    calls: dict[str, Callable[..., Any]] = field(default_factory=dict)
    inert: tuple[str, ...] = ()
    storage: Callable[[Any], Any] | None = None
    copied: int = 0

    def resolve(self, module: Any, name: Any) -> Any:
        """The value of a global.

        Raises:
            RefusedError: it is none of those above.
        """
        if not isinstance(module, str) or not isinstance(name, str):
            raise RefusedError("a class whose name is no text")
        full = f"{module}.{name}"
        if full in self.values:
            return self.values[full]
        if full in self.calls or full.startswith(self.inert):
            return Global(module, name)
        raise RefusedError(brief(full))

    def call(self, function: Any, arguments: Any) -> Any:
        """Carry out a call, by the table or as a stand-in.

        Raises:
            RefusedError: what is called is not a global of this pickle.
        """
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise RefusedError("a call of something that is not a class")
        self.copied += sum(len(a) for a in arguments if isinstance(a, (list, tuple, dict, str, bytes)))
        if self.copied > _MOST_OPCODES:
            raise ValueError("it copies its parts without end")
        known = self.calls.get(str(function))
        return StandIn(function, arguments) if known is None else known(*arguments)


class _Bounded:
    """A file for pickletools: one that never reads far in one go."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, count: int) -> bytes:
        if count > _LONGEST:
            raise ValueError("a value is too long")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(1 << 16)


def load_pickle(file: BinaryIO, vocabulary: Vocabulary, label: str) -> Any:
    """The value of one pickle.

    Args:
        file: at the first byte of the pickle; left just behind it.
        vocabulary: what the pickle may name.
        label: of the file, for messages.

    Raises:
        UserError: the pickle is damaged, or names a class or function that checkpoints do not need.
    """
    machine = _Machine(vocabulary)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(_Bounded(file))):  # type: ignore[arg-type]
            if count > _MOST_OPCODES:
                raise ValueError("it has too many parts")
            machine.step(opcode.name, argument)
        return machine.result()
    except RefusedError as refused:
        raise UserError(
            f"{label} asks to load {refused}, which is neither a tensor nor plain data: nothing was run; it was not "
            "written by Megatron alone and may be harmful"
        ) from None
    except UserError:
        raise
    # Bytes of any kind can go wrong in any way here, and all of it means the same to the user.
    except Exception as error:
        raise UserError(f"{label} is damaged: its pickle cannot be read ({_short(error)}); fetch it again") from None


def _short(error: Exception) -> str:
    return brief(f"{type(error).__name__}: {error}", 120)


_MARK = object()
#: Opcodes whose argument, as pickletools decodes it, is the value.
_LITERALS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    )
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}


class _Machine:
    """The stack machine of the pickle protocol, without the opcodes that import, extend or share buffers."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def result(self) -> Any:
        (value,) = self.stack
        if value is _MARK:
            raise ValueError("it is empty")
        return value

    def step(self, name: str, argument: Any) -> None:
        """Carry out one opcode."""
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        else:
            action = getattr(self, f"_do_{name.lower()}", None)
            if action is None:
                raise RefusedError(f"something by the pickle instruction {name}")
            action(argument)

    def _pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark is in the way")
        return value

    def _pop_to_mark(self) -> list[Any]:
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                items = self.stack[at + 1 :]
                del self.stack[at:]
                return items
        raise ValueError("a mark is missing")

    # ------------------------------------------------------------ bookkeeping

    def _do_proto(self, version: int) -> None:
        if version > 5:
            raise ValueError(f"pickle protocol {version} is unknown")

    def _do_frame(self, _: int) -> None:
        """Frames only help to read ahead."""

    def _do_stop(self, _: None) -> None:
        """The end; :meth:`result` follows."""

    def _do_pop(self, _: None) -> None:
        self.stack.pop()

    def _do_pop_mark(self, _: None) -> None:
        self._pop_to_mark()

    def _do_dup(self, _: None) -> None:
        self.stack.append(self.stack[-1])

    def _do_put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _do_binput = _do_long_binput = _do_put

    def _do_memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _do_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _do_binget = _do_long_binget = _do_get

    # ------------------------------------------------------------ containers

    def _do_tuple1(self, _: None) -> None:
        self.stack.append((self._pop(),))

    def _do_tuple2(self, _: None) -> None:
        last, first = self._pop(), self._pop()
        self.stack.append((first, last))

    def _do_tuple3(self, _: None) -> None:
        last, middle, first = self._pop(), self._pop(), self._pop()
        self.stack.append((first, middle, last))

    def _do_tuple(self, _: None) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def _do_list(self, _: None) -> None:
        self.stack.append(self._pop_to_mark())

    def _do_dict(self, _: None) -> None:
        self.stack.append(_paired(self._pop_to_mark()))

    def _do_frozenset(self, _: None) -> None:
        self.stack.append(frozenset(_key(item) for item in self._pop_to_mark()))

    def _do_append(self, _: None) -> None:
        value = self._pop()
        _expect(self.stack[-1], list).append(value)

    def _do_appends(self, _: None) -> None:
        values = self._pop_to_mark()
        _expect(self.stack[-1], list).extend(values)

    def _do_additems(self, _: None) -> None:
        values = self._pop_to_mark()
        _expect(self.stack[-1], set).update(_key(value) for value in values)

    def _do_setitem(self, _: None) -> None:
        value, key = self._pop(), self._pop()
        _expect(self.stack[-1], dict)[_key(key)] = value

    def _do_setitems(self, _: None) -> None:
        values = _paired(self._pop_to_mark())
        _expect(self.stack[-1], dict).update(values)

    # ------------------------------------------------------------ classes and objects

    def _do_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(self.vocabulary.resolve(module, name))

    def _do_stack_global(self, _: None) -> None:
        name, module = self._pop(), self._pop()
        self.stack.append(self.vocabulary.resolve(module, name))

    def _do_reduce(self, _: None) -> None:
        arguments, function = self._pop(), self._pop()
        self.stack.append(self.vocabulary.call(function, arguments))

    _do_newobj = _do_reduce

    def _do_newobj_ex(self, _: None) -> None:
        keywords, arguments, function = self._pop(), self._pop(), self._pop()
        self.stack.append(self.vocabulary.call(function, arguments))
        if keywords:
            self.stack.append(keywords)
            self._do_build(None)

    def _do_build(self, _: None) -> None:
        state = self._pop()
        target = self.stack[-1]
        if isinstance(target, argparse.Namespace):
            if target.__dict__:
                raise ValueError("attributes are set twice")
            target.__dict__.update({str(_key(key)): value for key, value in _expect(state, dict).items()})
        elif isinstance(target, StandIn):
            target.state = state
        elif not isinstance(target, dict):
            # Attributes of an ordered dict (torch's `_metadata`) are not needed, all else has none.
            raise ValueError("attributes are set on something that has none")

    def _do_binpersid(self, _: None) -> None:
        if self.vocabulary.storage is None:
            raise ValueError("it refers to data outside of it")
        self.stack.append(self.vocabulary.storage(self._pop()))


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {kind.__name__} was expected")
    return value


def _paired(items: list[Any]) -> dict[Any, Any]:
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _key(value: Any) -> Any:
    """A dictionary key; nested tuples, which can take for ever to hash, are none."""
    plain = (str, bytes, int, float, bool, type(None))
    if isinstance(value, (*plain, StandIn, Global)):
        return value
    if isinstance(value, tuple) and all(isinstance(item, plain) for item in value):
        return value
    raise ValueError("a key is no plain value")
