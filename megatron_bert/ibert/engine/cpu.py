# SPDX-License-Identifier: Apache-2.0
"""The cpu backend: C++ with the best instructions that the processor has, chosen when a plan is made ready.

The instruction set is that of the environment variable ``MEGATRON_BERT_CPU_TARGET`` (plain, avx2, avxvnni, avx512 or
amx) if it is set.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_bert.ibert.engine.backend import HeadName
from megatron_bert.ibert.engine.native_library import library
from megatron_bert.ibert.engine.plan import Plan
from megatron_bert.ibert.engine.plan_file import plan_bytes
from parallel.errors import UserError

_ERROR_SIZE = 1024


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
    engine, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "load": (engine, [text, ctypes.c_int, text, size]),
        "load_memory": (engine, [ctypes.c_void_p, size, ctypes.c_int, text, size]),
        "free": (None, [engine]),
        "target": (text, [engine]),
        "hidden_size": (ctypes.c_int, [engine]),
        "outputs": (ctypes.c_int, [engine, text]),
        "encode": (ctypes.c_int, [engine, *[ctypes.c_void_p] * 4, ctypes.c_int, ctypes.c_void_p, text, size]),
        "head": (
            ctypes.c_int,
            [engine, text, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, text, size],
        ),
        "float_flags": (ctypes.c_uint, [ctypes.c_int]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, f"integer_engine_{name}")
        function.restype, function.argtypes = result, arguments
    return loaded


class CpuBackend:
    """C++ on this machine's processor."""

    name = "cpu"
    keeps_plan = False

    def __init__(self) -> None:
        native()

    def prepare(self, plan: Plan, threads: int | None = None) -> CpuExecutable:
        """Pack the weights for the instruction set.

        Args:
            plan: to run.
            threads: to use; None for torch's number.
        """
        return CpuExecutable(plan_bytes(plan, digest=False), threads or torch.get_num_threads())


class CpuExecutable:
    """A plan packed for the instruction set; see :class:`~megatron_bert.ibert.engine.backend.Executable`.

    Args:
        plan: the contents of a plan's file.
        threads: to use.

    Raises:
        UserError: the plan is damaged, or the instruction set asked for is not there.
    """

    def __init__(self, plan: bytes, threads: int) -> None:
        self._native = native()
        self._lock = threading.Lock()  # an engine's memory is one call's at a time
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        self._engine = self._native.integer_engine_load_memory(plan, len(plan), threads, error, _ERROR_SIZE)
        if not self._engine:
            raise UserError(f"the cpu backend cannot use the plan: {error.value.decode(errors='replace')}")
        self._hidden = self._native.integer_engine_hidden_size(self._engine)

    def __del__(self) -> None:
        if getattr(self, "_engine", None):
            self._native.integer_engine_free(self._engine)
            self._engine = None

    @property
    def target(self) -> str:
        """The instruction set."""
        return self._native.integer_engine_target(self._engine).decode()

    def encode(self, tokens: Tensor, positions: Tensor, types: Tensor, starts: Tensor) -> Tensor:
        """See :class:`~megatron_bert.ibert.engine.backend.Executable`."""
        inputs = [t.to(torch.int32).contiguous() for t in (tokens, positions, types, starts)]
        if {len(t) for t in inputs[:3]} != {int(starts[-1])}:
            raise UserError(f"sequences end at token {int(starts[-1])}, but {len(tokens)} tokens are given")
        hidden = torch.empty(len(tokens), self._hidden, dtype=torch.int16)
        self._call("encode", *(t.data_ptr() for t in inputs), len(starts) - 1, hidden.data_ptr())
        return hidden

    def head(self, name: HeadName, rows: Tensor) -> Tensor:
        """See :class:`~megatron_bert.ibert.engine.backend.Executable`."""
        given = rows.to(torch.int16).contiguous()
        if given.dim() != 2 or given.shape[1] != self._hidden:
            raise UserError(f"rows have the shape {list(rows.shape)}, but the plan's have {self._hidden} columns")
        outputs = self._native.integer_engine_outputs(self._engine, name.encode())
        out = torch.empty(len(rows), outputs, dtype=torch.int32)
        self._call("head", name.encode(), given.data_ptr(), len(rows), out.data_ptr())
        return out.to(torch.int16) if name == "pooler" else out

    def _call(self, function: str, *arguments: Any) -> None:
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        with self._lock:
            failed = getattr(self._native, f"integer_engine_{function}")(self._engine, *arguments, error, _ERROR_SIZE)
        if failed:
            raise UserError(error.value.decode(errors="replace"))
