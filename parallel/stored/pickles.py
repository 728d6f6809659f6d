# SPDX-License-Identifier: Apache-2.0
"""An unpickler that can build data and nothing else, in bounded memory: the one door for all pickles.

The C implementation can be restricted too, but not as far as files of unknown origin ask for: an allowed class can
still be given attributes, a short file can make it fill memory with an empty memo table, and torch's ``weights_only``
reader stops at every class it does not know, among them ``argparse.Namespace`` and Megatron's own. Here only opcodes
that build data are carried out, those that touch objects by methods below, and every object made is counted against a
limit. Names of classes become inert :class:`Global` values; calling one looks up what it stands for in a table, or
makes an inert :class:`StandIn`. No name is ever imported.
"""

from __future__ import annotations

import argparse
import pickle
import pickletools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from parallel.errors import DamagedFileError, UserError, brief
from parallel.stored.vocabulary import Global, RefusedError, StandIn, Vocabulary

#: Memory that any pickle may fill, and how much more for each of its bytes; real ones fill up to 27 bytes a byte (the
#: metadata of distributed checkpoints), one of nothing but empty lists 36.
_ANY_MEMORY, _MEMORY_A_BYTE = 8 << 20, 32
#: Opcodes between two checks of the limits.
_STRIDE = 4096
#: An entry of a dictionary or set, and a mark that waits for its end, in bytes.
_ENTRY, _LEVEL = 100, 64


@dataclass(frozen=True)
class Limits:
    """How many opcodes a pickle may have, and how many bytes its objects may fill; a short one is held to less."""

    opcodes: int
    memory: int


#: The largest pickles of torch.save (sharded optimizers) have a few million opcodes.
PLAIN = Limits(opcodes=20_000_000, memory=256 << 20)


def load_pickle(file: BinaryIO, vocabulary: Vocabulary, label: str, limits: Limits = PLAIN) -> Any:
    """The value of one pickle, at whose first byte the file is; it is left just behind it.

    Raises:
        UserError: the pickle is damaged, asks for more memory than its size explains, or names a class or function that
            checkpoints do not need.
    """
    try:
        return _Unpickler(file, vocabulary, limits).load()
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
        reason = brief(f"{type(error).__name__}: {error}", 120)
        raise DamagedFileError(f"{label} is damaged: its pickle cannot be read ({reason})") from None


_TOO_LARGE = "it fills more memory than its size explains"
#: Opcodes that only build data, or remember it, as Python's own unpickler does.
_PLAIN_OPCODES = (
    *("PROTO", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2"),
    *("EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_DICT", "EMPTY_SET", "LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET", "MEMOIZE", "APPEND", "APPENDS"),
    *("GLOBAL", "STACK_GLOBAL", "BINPERSID"),
)
#: The same, of a value as long as the file says.
_LITERALS = (
    *("INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
)
#: Bytes that an opcode with a size of its own fills; all others take a place on the stack.
_SIZES = {"EMPTY_LIST": 64, "EMPTY_DICT": 72, "EMPTY_SET": 224, "LIST": 64, "DICT": 72, "FROZENSET": 224}
_SIZES |= {"TUPLE1": 56, "TUPLE2": 64, "TUPLE3": 72, "TUPLE": 48, "BININT": 40, "BININT2": 40}
_SIZES |= dict.fromkeys(("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BINPERSID"), 160)


class _Memo(list[Any]):
    """Values by the numbers under which they are remembered: in order, as picklers count, and those out of it."""

    def __init__(self, charge: Callable[[int], None]) -> None:
        self._charge = charge
        self._scattered: dict[int, Any] = {}

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index) if index < len(self) else self._scattered[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        if index == len(self):
            self.append(value)
        elif index < len(self):
            super().__setitem__(index, value)
        else:
            self._charge(_ENTRY)
            self._scattered[index] = value


_Python: Any = pickle._Unpickler


class _Unpickler(_Python):
    """Python's implementation, without the opcodes that import, extend or share buffers, on bounded memory."""

    def __init__(self, file: BinaryIO, vocabulary: Vocabulary, limits: Limits) -> None:
        super().__init__(file, encoding="latin-1")
        self.vocabulary, self.limits, self.memory = vocabulary, limits, 0
        self.tell, self.find_class = file.tell, vocabulary.resolve
        self.stack: list[Any] = []
        self.metastack: list[list[Any]] = []
        self.memo = _Memo(self._charge)
        self.append = self.stack.append

    def load(self) -> Any:
        """Carry out the opcodes up to the end of the pickle.

        Raises:
            RefusedError: one of them asks for something else than data.
            Exception: of any kind, for a damaged pickle.
        """
        read, stop, start = self._file_read, pickle.STOP[0], self.tell()
        for _ in range(0, self.limits.opcodes, _STRIDE):
            for _ in range(_STRIDE):
                code = ord(read(1))
                if code == stop:
                    (value,) = self.stack
                    return value
                self.memory += _COSTS[code]
                _ACTIONS[code](self)
            memory = self.memory + _LEVEL * len(self.metastack)
            if memory > min(self.limits.memory, _ANY_MEMORY + _MEMORY_A_BYTE * (self.tell() - start)):
                raise ValueError(_TOO_LARGE)
        raise ValueError("it has too many parts")

    def read(self, count: int) -> bytes:
        """The argument of an opcode."""
        self._charge(count)
        return self._file_read(count)

    def readline(self) -> bytes:
        """The argument of an opcode that is text."""
        return self._file_readline(1 << 16)

    def persistent_load(self, identity: Any) -> Any:
        """What lies outside of the pickle."""
        if self.vocabulary.storage is None:
            raise ValueError("it refers to data outside of it")
        return self.vocabulary.storage(identity)

    def _charge(self, memory: int) -> None:
        """Count memory that is about to be filled at once."""
        self.memory += memory
        if self.memory > self.limits.memory:
            raise ValueError(_TOO_LARGE)

    def _frame(self) -> None:
        self.read(8)  # frames only help to read ahead

    def _bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    # ------------------------------------------------------------ containers with keys

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._update(items)

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _setitems(self) -> None:
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        self.memory += _ENTRY * (len(items) // 2)
        pairs = {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}
        if isinstance(target, StandIn):
            target.extend(list(pairs.items()))
        else:
            _expect(target, dict).update(pairs)

    def _additems(self) -> None:
        values, target = self.pop_mark(), self.stack[-1]
        self.memory += _ENTRY * len(values)
        if isinstance(target, StandIn):
            target.extend(values)
        else:
            _expect(target, set).update(map(_key, values))

    def _frozenset(self) -> None:
        values = self.pop_mark()
        self.memory += _ENTRY * len(values)
        self.append(frozenset(map(_key, values)))

    # ------------------------------------------------------------ objects

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        # A short file could have a long list copied over and over.
        for argument in _expect(arguments, tuple):
            if isinstance(argument, (list, tuple, dict, set, frozenset)):
                self._charge(_ENTRY * len(argument))
            elif isinstance(argument, (str, bytes)):
                self._charge(len(argument))
        self.append(self.vocabulary.call(function, arguments))

    _newobj = _reduce

    def _newobj_ex(self) -> None:
        keywords = self.stack.pop()
        self._reduce()
        if keywords:
            self.append(keywords)
            self._build()

    def _build(self) -> None:
        state = self.stack.pop()
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


def _literal(load: Callable[[_Unpickler], None], unpickler: _Unpickler) -> None:
    load(unpickler)
    unpickler._charge(sys.getsizeof(unpickler.stack[-1]))


def _refuse(name: str, _: _Unpickler) -> None:
    raise RefusedError(f"something by the pickle instruction {name}")


def _unknown(_: _Unpickler) -> None:
    raise ValueError("an unknown instruction")


#: What to do for each opcode, by its byte, and the bytes that it fills.
_ACTIONS: list[Callable[[_Unpickler], None]] = [_unknown] * 256
_COSTS = [0] * 256
for _name, _code in ((opcode.name, ord(opcode.code)) for opcode in pickletools.opcodes):
    _COSTS[_code] = _SIZES.get(_name, 8)
    if _name in _PLAIN_OPCODES:
        _ACTIONS[_code] = _Python.dispatch[_code]
    elif _name in _LITERALS:
        _ACTIONS[_code] = partial(_literal, _Python.dispatch[_code])
    else:
        _ACTIONS[_code] = vars(_Unpickler).get(f"_{_name.lower()}", partial(_refuse, _name))


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {kind.__name__} was expected")
    return value


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
