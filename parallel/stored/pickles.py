# SPDX-License-Identifier: Apache-2.0
"""An interpreter of pickles that can build data and nothing else, in bounded memory: the one door for all of them.

Python's own unpickler can be restricted too, but not as far as files of unknown origin ask for: an allowed class can
still be given attributes, a short file can make the C implementation fill memory with an empty memo table, and torch's
``weights_only`` reader stops at every class it does not know, among them ``argparse.Namespace`` and Megatron's own.
Here each opcode that only builds data is carried out below, and every object made is counted against a limit. Names of
classes become inert :class:`Global` values; calling one looks up what it stands for in a table, or makes an inert
:class:`StandIn`. No name is ever imported.
"""

from __future__ import annotations

import argparse
import pickletools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from parallel.errors import DamagedFileError, UserError, brief
from parallel.stored.vocabulary import Global, RefusedError, StandIn, Vocabulary

#: Longest single string, in bytes: tensors lie outside the pickle, random states are a few kilobytes.
_LONGEST = 64 << 20
#: Memory that any pickle may fill, and how much more for each of its bytes; real ones fill up to 27 bytes a byte (the
#: metadata of distributed checkpoints), one of nothing but empty lists 36.
_ANY_MEMORY, _MEMORY_A_BYTE = 8 << 20, 32
#: Opcodes between two checks of the limits.
_STRIDE = 4096
#: An entry of a dictionary or set, in bytes.
_ENTRY = 100


@dataclass(frozen=True)
class Limits:
    """How far a pickle may go.

    Attributes:
        opcodes: of one pickle.
        memory: bytes of the objects that it builds; a short pickle is held to less.
    """

    opcodes: int
    memory: int


#: The largest pickles of torch.save (sharded optimizers) have a few million opcodes.
PLAIN = Limits(opcodes=20_000_000, memory=256 << 20)


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


def load_pickle(file: BinaryIO, vocabulary: Vocabulary, label: str, limits: Limits = PLAIN) -> Any:
    """The value of one pickle.

    Args:
        file: at the first byte of the pickle; left just behind it.
        vocabulary: what the pickle may name.
        label: of the file, for messages.
        limits: how far it may go.

    Raises:
        UserError: the pickle is damaged, asks for more memory than its size explains, or names a class or function that
            checkpoints do not need.
    """
    try:
        return _Machine(file, vocabulary, limits).run()
    except RefusedError as refused:
        raise DamagedFileError(
            f"{label} asks to load {refused}, which is neither a tensor nor plain data: nothing was run, and the file "
            "may be harmful",
            "use one from a source that you trust",
        ) from None
    except UserError:
        raise
    # Bytes of any kind can go wrong in any way here, and all of it means the same to the user.
    except Exception as error:
        raise DamagedFileError(f"{label} is damaged: its pickle cannot be read ({_short(error)})") from None


def _unknown() -> None:
    raise ValueError("an unknown instruction")


def _refuse(name: str) -> None:
    raise RefusedError(f"something by the pickle instruction {name}")


def _short(error: Exception) -> str:
    return brief(f"{type(error).__name__}: {error}", 120)


_TOO_LARGE = "it fills more memory than its size explains"
_MARK = object()
_STOP = ord(".")
#: Opcodes whose argument, as pickletools decodes it, is the value.
_LITERALS = frozenset(
    (
        *("INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
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
#: Opcodes whose methods read the argument, without pickletools: they make up most of a pickle.
_READ_THEMSELVES = frozenset(("BININT", "BININT1", "BININT2", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"))
#: Bytes that an opcode with a size of its own fills; all others take a place on the stack.
_SIZES = {"EMPTY_LIST": 64, "EMPTY_DICT": 72, "EMPTY_SET": 224, "LIST": 64, "DICT": 72, "FROZENSET": 224}
_SIZES |= {"TUPLE1": 56, "TUPLE2": 64, "TUPLE3": 72, "TUPLE": 48, "BININT": 40, "BININT2": 40}
_SIZES |= dict.fromkeys(("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BINPERSID"), 160)
#: The same by the byte of the opcode.
_COSTS = [0] * 256
for _opcode in pickletools.opcodes:
    _COSTS[ord(_opcode.code)] = _SIZES.get(_opcode.name, 8)


class _Machine:
    """The stack machine of the pickle protocol, without the opcodes that import, extend or share buffers."""

    def __init__(self, file: BinaryIO, vocabulary: Vocabulary, limits: Limits) -> None:
        self.file, self.vocabulary, self.limits = file, vocabulary, limits
        self.read = file.read
        self.stack: list[Any] = []
        #: Values remembered in the order of their numbers, as picklers count, and those out of it.
        self.memo: list[Any] = []
        self.scattered: dict[int, Any] = {}
        self.memory = 0

    def run(self) -> Any:
        """Carry out the opcodes up to the end of the pickle.

        Raises:
            RefusedError: one of them asks for something else than data.
            Exception: of any kind, for a damaged pickle.
        """
        read, actions, start = self.read, self._actions(), self.file.tell()
        for _ in range(0, self.limits.opcodes, _STRIDE):
            for _ in range(_STRIDE):
                code = ord(read(1))
                if code == _STOP:
                    return self._result()
                self.memory += _COSTS[code]
                actions[code]()
            if self.memory > min(self.limits.memory, _ANY_MEMORY + _MEMORY_A_BYTE * (self.file.tell() - start)):
                raise ValueError(_TOO_LARGE)
        raise ValueError("it has too many parts")

    def _actions(self) -> list[Callable[[], None]]:
        """What to do for each opcode, by its byte."""
        actions: list[Callable[[], None]] = [_unknown] * 256
        for opcode in pickletools.opcodes:
            actions[ord(opcode.code)] = self._action(opcode)
        return actions

    def _action(self, opcode: pickletools.OpcodeInfo) -> Callable[[], None]:
        name, push = opcode.name, self.stack.append
        if name in _CONSTANTS:
            make = _CONSTANTS[name]
            return lambda: push(make())
        action: Any = self._literal if name in _LITERALS else getattr(self, f"_do_{name.lower()}", None)
        if action is None:
            return partial(_refuse, name)
        if opcode.arg is None or name in _READ_THEMSELVES:
            return action
        read: Callable[[_Bounded], Any] = opcode.arg.reader  # type: ignore[assignment]
        bounded = _Bounded(self.file)
        return lambda: action(read(bounded))

    def _result(self) -> Any:
        (value,) = self.stack
        if value is _MARK:
            raise ValueError("it is empty")
        return value

    def _literal(self, value: Any) -> None:
        self._charge(sys.getsizeof(value))
        self.stack.append(value)

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
                self.memory += 8 * len(items)
                return items
        raise ValueError("a mark is missing")

    def _charge(self, memory: int) -> None:
        """Count memory that is about to be filled at once."""
        self.memory += memory
        if self.memory > self.limits.memory:
            raise ValueError(_TOO_LARGE)

    # ------------------------------------------------------------ opcodes that read their arguments themselves

    def _do_binint(self) -> None:
        self.stack.append(int.from_bytes(self._exactly(4), "little", signed=True))

    def _do_binint1(self) -> None:
        self.stack.append(ord(self.read(1)))

    def _do_binint2(self) -> None:
        self.stack.append(int.from_bytes(self._exactly(2), "little"))

    def _do_binput(self) -> None:
        self._put(ord(self.read(1)))

    def _do_long_binput(self) -> None:
        self._put(int.from_bytes(self._exactly(4), "little"))

    def _do_binget(self) -> None:
        self._get(ord(self.read(1)))

    def _do_long_binget(self) -> None:
        self._get(int.from_bytes(self._exactly(4), "little"))

    def _exactly(self, count: int) -> bytes:
        data = self.read(count)
        if len(data) != count:
            raise EOFError("it ends too early")
        return data

    # ------------------------------------------------------------ bookkeeping

    def _do_proto(self, version: int) -> None:
        if version > 5:
            raise ValueError(f"pickle protocol {version} is unknown")

    def _do_frame(self, _: int) -> None:
        """Frames only help to read ahead."""

    def _do_pop(self) -> None:
        self.stack.pop()

    def _do_pop_mark(self) -> None:
        self._pop_to_mark()

    def _do_dup(self) -> None:
        self.stack.append(self.stack[-1])

    def _put(self, index: int) -> None:
        if index == len(self.memo):
            self.memo.append(self.stack[-1])
        elif index < len(self.memo):
            self.memo[index] = self.stack[-1]
        else:
            self._charge(_ENTRY)
            self.scattered[index] = self.stack[-1]

    _do_put = _put

    def _do_memoize(self) -> None:
        self.memo.append(self.stack[-1])

    def _get(self, index: int) -> None:
        self.stack.append(self.memo[index] if index < len(self.memo) else self.scattered[index])

    _do_get = _get

    # ------------------------------------------------------------ containers

    def _do_tuple1(self) -> None:
        self.stack.append((self._pop(),))

    def _do_tuple2(self) -> None:
        last, first = self._pop(), self._pop()
        self.stack.append((first, last))

    def _do_tuple3(self) -> None:
        last, middle, first = self._pop(), self._pop(), self._pop()
        self.stack.append((first, middle, last))

    def _do_tuple(self) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def _do_list(self) -> None:
        self.stack.append(self._pop_to_mark())

    def _do_dict(self) -> None:
        items = self._pop_to_mark()
        self.memory += _ENTRY * (len(items) // 2)
        self.stack.append(_paired(items))

    def _do_frozenset(self) -> None:
        items = self._pop_to_mark()
        self.memory += _ENTRY * len(items)
        self.stack.append(frozenset(_key(item) for item in items))

    def _do_append(self) -> None:
        value, target = self._pop(), self.stack[-1]
        (target if isinstance(target, StandIn) else _expect(target, list)).extend([value])

    def _do_appends(self) -> None:
        values, target = self._pop_to_mark(), self.stack[-1]
        (target if isinstance(target, StandIn) else _expect(target, list)).extend(values)

    def _do_additems(self) -> None:
        values, target = self._pop_to_mark(), self.stack[-1]
        self.memory += _ENTRY * len(values)
        if isinstance(target, StandIn):
            target.extend(values)
        else:
            _expect(target, set).update(_key(value) for value in values)

    def _do_setitem(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _do_setitems(self) -> None:
        self._set_items(self._pop_to_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        self.memory += _ENTRY * (len(items) // 2)
        if isinstance(target, StandIn):
            target.extend(list(_paired(items).items()))
        else:
            _expect(target, dict).update(_paired(items))

    # ------------------------------------------------------------ classes and objects

    def _do_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(self.vocabulary.resolve(module, name))

    def _do_stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self.stack.append(self.vocabulary.resolve(module, name))

    def _do_reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        self._call(function, arguments)

    _do_newobj = _do_reduce

    def _call(self, function: Any, arguments: Any) -> None:
        # A short file could have a long list copied over and over.
        for argument in _expect(arguments, tuple):
            if isinstance(argument, (list, tuple, dict, set, frozenset)):
                self._charge(_ENTRY * len(argument))
            elif isinstance(argument, (str, bytes)):
                self._charge(len(argument))
        self.stack.append(self.vocabulary.call(function, arguments))

    def _do_newobj_ex(self) -> None:
        keywords, arguments, function = self._pop(), self._pop(), self._pop()
        self._call(function, arguments)
        if keywords:
            self.stack.append(keywords)
            self._do_build()

    def _do_build(self) -> None:
        state = self._pop()
        target = self.stack[-1]
        if isinstance(target, argparse.Namespace):
            if target.__dict__:
                raise ValueError("attributes are set twice")
            self._charge(_ENTRY * len(_expect(state, dict)))
            target.__dict__.update({str(_key(key)): value for key, value in state.items()})
        elif isinstance(target, StandIn):
            target.state = state
        elif not isinstance(target, dict):
            # Attributes of an ordered dict (torch's `_metadata`) are not needed, all else has none.
            raise ValueError("attributes are set on something that has none")

    def _do_binpersid(self) -> None:
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
    kind = type(value)
    if kind is str or kind is StandIn or kind is Global or kind is bytes or kind is float or value is None:
        return value
    # Large integers can be chosen so that all of them hash alike.
    if (kind is int or kind is bool) and value.bit_length() <= 60:
        return value
    if kind is tuple and all(type(item) is not tuple and item is _key(item) for item in value):
        return value
    raise ValueError("a key is not a plain value")
