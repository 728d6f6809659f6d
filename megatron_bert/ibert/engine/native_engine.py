# SPDX-License-Identifier: Apache-2.0
"""The C++ engine behind Python: its C interface by ctypes, for arrays. Nothing here imports torch.

Shapes: B sequences, T tokens end to end, H hidden size, R rows.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_bert.ibert.engine.arguments import check_end, check_rows
from megatron_bert.ibert.engine.native_library import library
from parallel.errors import UserError

_ERROR_SIZE = 1024
Integers = NDArray[np.integer[Any]]


@cache
def native() -> ctypes.CDLL:
    """The library with the types of its functions.

    Raises:
        UserError: it cannot be built or loaded.
    """
    try:
        loaded = ctypes.CDLL(str(library()))
    except OSError as error:
        raise UserError(f"cannot load the cpu backend: {error}") from None
    engine, text, size, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "load": (engine, [text, number, text, size]),
        "load_memory": (engine, [ctypes.c_void_p, size, number, text, size]),
        "free": (None, [engine]),
        "target": (text, [engine]),
        "hidden_size": (number, [engine]),
        "longest": (number, [engine]),
        "hidden_exponent": (number, [engine]),
        "outputs": (number, [engine, text]),
        "encode": (number, [engine, *[ctypes.c_void_p] * 4, number, ctypes.c_void_p, text, size]),
        "head": (number, [engine, text, ctypes.c_void_p, number, ctypes.c_void_p, text, size]),
        "float_flags": (ctypes.c_uint, [number]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, f"integer_engine_{name}")
        function.restype, function.argtypes = result, arguments
    return loaded


class NativeEngine:
    """A plan packed for an instruction set.

    Args:
        plan: a plan's file, whose digest is checked, or the contents of one, whose digest is not looked at.
        threads: to use.

    Raises:
        UserError: the plan is damaged, or the instruction set asked for is not there.
    """

    def __init__(self, plan: Path | bytes, threads: int) -> None:
        self._native = native()
        self._lock = threading.Lock()  # an engine's memory is one call's at a time
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        if isinstance(plan, bytes):
            self._engine = self._native.integer_engine_load_memory(plan, len(plan), threads, error, _ERROR_SIZE)
        else:
            self._engine = self._native.integer_engine_load(str(plan).encode(), threads, error, _ERROR_SIZE)
        if not self._engine:
            what = "cannot use the plan: " if isinstance(plan, bytes) else ""
            raise UserError(f"the cpu backend {what}{error.value.decode(errors='replace')}")
        self.hidden_size: int = self._native.integer_engine_hidden_size(self._engine)

    def __del__(self) -> None:
        if getattr(self, "_engine", None):
            self._native.integer_engine_free(self._engine)
            self._engine = None

    @property
    def target(self) -> str:
        """The instruction set."""
        return self._native.integer_engine_target(self._engine).decode()

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have."""
        return self._native.integer_engine_longest(self._engine)

    @property
    def hidden_exponent(self) -> int:
        """The final stream holds multiples of 2^-this."""
        return self._native.integer_engine_hidden_exponent(self._engine)

    def outputs(self, head: str) -> int:
        """Width of a head; 0 where the plan has none of that name."""
        return self._native.integer_engine_outputs(self._engine, head.encode())

    def encode(
        self, tokens: Integers, positions: Integers | None, types: Integers | None, starts: Integers
    ) -> NDArray[np.int16]:
        """Run the encoder on sequences that stand end to end.

        Args:
            tokens, positions, types: ``[T]``; without positions those of each sequence from its first, without types 0.
            starts: ``[B + 1]``, where each sequence begins, and T.

        Returns:
            The final stream ``[T, H]``.

        Raises:
            UserError: something is out of range.
        """
        given = [None if each is None else np.ascontiguousarray(each, np.int32) for each in (tokens, positions, types)]
        ends = np.ascontiguousarray(starts, np.int32)
        check_end(int(ends[-1]), *given)
        out = np.empty((int(ends[-1]), self.hidden_size), np.int16)
        addresses = [None if each is None else each.ctypes.data for each in (*given, ends)]
        self._call("encode", *addresses, len(ends) - 1, out.ctypes.data)
        return out

    def head(self, name: str, rows: Integers) -> NDArray[np.int32]:
        """Run a head.

        Args:
            name: of it.
            rows: ``[R, H]`` of the final stream, or of the pooler's results.

        Returns:
            ``[R, outputs]``.

        Raises:
            UserError: the plan has no such head, or rows of another size.
        """
        given = np.ascontiguousarray(rows, np.int16)
        check_rows(given.shape, self.hidden_size)
        out = np.empty((len(given), self.outputs(name)), np.int32)
        self._call("head", name.encode(), given.ctypes.data, len(given), out.ctypes.data)
        return out

    def _call(self, function: str, *arguments: Any) -> None:
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        with self._lock:
            failed = getattr(self._native, f"integer_engine_{function}")(self._engine, *arguments, error, _ERROR_SIZE)
        if failed:
            raise UserError(error.value.decode(errors="replace"))
