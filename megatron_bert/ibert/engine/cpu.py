# SPDX-License-Identifier: Apache-2.0
"""The cpu backend: C++ with the best instructions that the processor has, chosen when a plan is made ready.

The instruction set is that of the environment variable ``MEGATRON_BERT_CPU_TARGET`` (plain, avx2, avxvnni, avx512 or
amx; on ARM plain, neon, neon_dot or neon_i8mm) if it is set.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_bert.ibert.engine.backend import HeadName
from megatron_bert.ibert.engine.native_engine import NativeEngine, native
from megatron_bert.ibert.engine.plan import Plan
from megatron_bert.ibert.engine.plan_file import plan_bytes


class CpuBackend:
    """C++ on this machine's processor."""

    name = "cpu"

    def __init__(self) -> None:
        native()

    def prepare(self, plan: Plan, threads: int | None = None) -> CpuExecutable:
        """Pack the weights for the instruction set.

        Args:
            plan: to run.
            threads: to use; None for torch's number.
        """
        return CpuExecutable(plan_bytes(plan, digest=False), threads or torch.get_num_threads())

    def prepare_file(self, path: Path, threads: int | None = None) -> CpuExecutable:
        """The same of a plan's file, without reading it into tensors first.

        Args:
            path: of the plan.
            threads: to use; None for torch's number.
        """
        return CpuExecutable(path, threads or torch.get_num_threads())


class CpuExecutable:
    """A plan packed for the instruction set; see :class:`~megatron_bert.ibert.engine.backend.Executable`.

    Args:
        plan: the contents of a plan's file, or its path.
        threads: to use.

    Raises:
        UserError: the plan is damaged, or the instruction set asked for is not there.
    """

    def __init__(self, plan: bytes | Path, threads: int) -> None:
        self._engine = NativeEngine(plan, threads)

    @property
    def target(self) -> str:
        """The instruction set."""
        return self._engine.target

    def encode(self, tokens: Tensor, positions: Tensor, types: Tensor, starts: Tensor) -> Tensor:
        """See :class:`~megatron_bert.ibert.engine.backend.Executable`."""
        return torch.from_numpy(self._engine.encode(*(each.numpy() for each in (tokens, positions, types, starts))))

    def head(self, name: HeadName, rows: Tensor) -> Tensor:
        """See :class:`~megatron_bert.ibert.engine.backend.Executable`."""
        out = torch.from_numpy(self._engine.head(name, rows.numpy()))
        return out.to(torch.int16) if name == "pooler" else out
