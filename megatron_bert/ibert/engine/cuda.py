# SPDX-License-Identifier: Apache-2.0
"""The cuda backend: Triton kernels on an NVIDIA GPU.

Its kernels give the bits of the reference in Triton's interpreter (``TRITON_INTERPRET=1`` in the environment, which
needs no GPU), and compile for compute capability 8.0 and 9.0 to integer instructions alone. They have not run on a GPU
yet, so ``auto`` does not take this backend: see :data:`megatron_bert.ibert.engine.backends.PREFERRED`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from megatron_bert.ibert.engine.arguments import check_end, check_rows
from megatron_bert.ibert.engine.backend import HeadName
from megatron_bert.ibert.engine.cuda_graphs import MOST_REPLAYED, Replay, recorder
from megatron_bert.ibert.engine.plan import Plan
from megatron_bert.ibert.engine.plan_file import read_plan
from parallel.errors import UserError

#: The least that the kernels are compiled for: 8-bit products of tensor cores with Triton's present layouts.
_LEAST_CAPABILITY = (8, 0)


class CudaBackend:
    """Triton on this process's GPU, or in Triton's interpreter.

    Attributes:
        device: the GPU; the CPU for the interpreter.

    Raises:
        UserError: there is no Triton, or no GPU that it serves.
    """

    name = "cuda"

    def __init__(self) -> None:
        self.device = _device()

    def prepare(self, plan: Plan, threads: int | None = None) -> CudaExecutable:
        """Copy the weights to the GPU.

        Args:
            plan: to run.
            threads: None: a GPU has its own.

        Raises:
            UserError: a number of threads is given.
        """
        if threads is not None:
            raise UserError(f"threads is {threads}, but the cuda backend takes no number of threads: leave it out")
        return CudaExecutable(plan, self.device)

    def prepare_file(self, path: Path, threads: int | None = None) -> CudaExecutable:
        """The same of a plan's file, of which nothing stays on the CPU."""
        return self.prepare(read_plan(path), threads)


def _device() -> torch.device:
    if find_spec("triton") is None:
        raise UserError("the cuda backend needs Triton: pip install 'megatron-bert[cuda]', or take another backend")
    import triton  # an optional dependency

    if triton.knobs.runtime.interpret:
        return torch.device("cpu")
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise UserError("the cuda backend needs an NVIDIA GPU, and torch finds none: take another backend")
    device = torch.device("cuda", torch.cuda.current_device())
    found = torch.cuda.get_device_capability(device)
    if found < _LEAST_CAPABILITY:
        least, there = (".".join(map(str, each)) for each in (_LEAST_CAPABILITY, found))
        raise UserError(f"the cuda backend needs compute capability {least}, and the GPU has {there}: take another one")
    return device


class CudaExecutable:
    """A plan on a GPU; see :class:`~megatron_bert.ibert.engine.backend.Executable`. Results stay there.

    Args:
        plan: to run.
        device: where.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        from megatron_bert.ibert.engine.cuda_model import CudaModel  # which imports Triton

        with _on(device):
            self._model = CudaModel(plan, device)
        tables = plan.embeddings
        sizes = (len(tables.word), len(tables.position), len(tables.token_type))
        self._tables = dict(zip(("token", "position", "type"), sizes, strict=True))
        self._longest = plan.longest
        self._replay = Replay(self._model.encode, device, recorder()) if device.type == "cuda" else None

    def encode(self, tokens: Tensor, positions: Tensor, types: Tensor, starts: Tensor) -> Tensor:
        """See :class:`~megatron_bert.ibert.engine.backend.Executable`.

        Raises:
            UserError: an id is in no table, or sequences do not fit: a kernel would read elsewhere.
        """
        from megatron_bert.ibert.engine.cuda_model import query_blocks

        ids, ends = self._checked(tokens, positions, types, starts)
        if not ids.shape[1]:
            return torch.empty(0, self._model.hidden, dtype=torch.int16, device=self._model.device)
        blocks = query_blocks(ends)
        with _on(self._model.device):
            if self._replay is not None and ids.shape[1] <= MOST_REPLAYED:
                return self._replay(ids, blocks)
            return self._model.encode(ids.to(self._model.device), blocks.to(self._model.device))

    def head(self, name: HeadName, rows: Tensor) -> Tensor:
        """See :class:`~megatron_bert.ibert.engine.backend.Executable`."""
        check_rows(rows.shape, self._model.hidden)
        with _on(self._model.device):
            return self._model.head(name, rows.to(self._model.device, torch.int16).contiguous())

    def _checked(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        *ids, starts = (each.to("cpu", torch.int32) for each in given)
        check_end(int(starts[-1]), *ids)
        lengths = starts.diff().tolist()
        for sequence, length in enumerate(lengths):
            if length < 0:
                raise UserError(f"sequence {sequence} ends before it begins")
            if length > self._longest:
                raise UserError(f"sequence {sequence} has {length} tokens, but the model takes at most {self._longest}")
        for (what, size), values in zip(self._tables.items(), ids, strict=True):
            wrong = values[(values < 0) | (values >= size)]
            if len(wrong):
                raise UserError(f"{what} {int(wrong[0])} is outside of 0 to {size - 1}")
        return torch.stack(ids), starts


def _on(device: torch.device) -> AbstractContextManager[object]:
    """A block whose kernels go to a device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
