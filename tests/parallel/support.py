# SPDX-License-Identifier: Apache-2.0
"""What the tests of parallel/ share: numbers by name, tolerances, and a small model of every kind of layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.collectives import gather_from_ranks
from parallel.data_parallel import finish_gradients, flat_buffers
from parallel.dropout import fold_in, keyed_dropout
from parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from parallel.mesh import SINGLE, TensorParallel
from parallel.recompute import Recompute, recomputed
from parallel.runs import Run, lone_run
from parallel.sharding import Constant, ParallelModule
from tests.worlds import gathered, preload

preload(__name__)

EPS64 = torch.finfo(torch.float64).eps


def uniform(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers in [-1, 1), the same on every rank that asks with the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1).to(dtype)


def own_share(tensor: Tensor, tp: TensorParallel, dim: int = 0) -> Tensor:
    """This rank's slice along ``dim``."""
    return tensor.chunk(tp.size, dim)[tp.rank].contiguous()


def assert_sums_equal(actual: Tensor, expected: Tensor, terms: int, magnitude: float = 1.0) -> None:
    """Equal up to the order in which up to ``terms`` products of at most ``magnitude`` were added up.

    A float sum of n terms is off by at most n eps sum |term| <= n^2 eps magnitude; both sides are such sums.
    """
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=0, atol=2 * terms**2 * eps * magnitude)


def runs_of(model: nn.Module) -> list[Run]:
    """What this rank updates of a model."""
    flat = flat_buffers(model)
    return [lone_run(p) for p in model.parameters()] if flat is None else flat.runs(lambda _: None)


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The whole gradient of every parameter by name, after the backward passes of a step; every rank must call."""
    finish_gradients(model)
    flat, gradients = flat_buffers(model), {}
    run_of = {parameter: run for run in runs_of(model) for parameter in run.members}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad
        if flat is not None:
            run = run_of[parameter]
            assert run.gradient is not None
            gradients[name] = gathered(run.part(parameter, run.gradient), flat.mesh)
        else:
            gradients[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).detach().clone()
    return gradients


class Operators(TorchDispatchMode):
    """Records the names of operators as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name().split("::")[1].split(".")[0])
        return function(*args, **(kwargs or {}))

    def count(self, *names: str) -> int:
        """How often any of the operators ran."""
        return sum(name in names for name in self.names)


class Living(TorchDispatchMode):
    """Follows the memory of every tensor that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def bytes_beside(self, *tensors: Tensor) -> int:
        """Bytes still held by anything, without those of ``tensors``."""
        excluded = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return sum(
            size
            for pointer, (storage, size) in self.storages.items()
            if pointer not in excluded and not storage.expired()
        )


class ToyNorm(ParallelModule):
    """A layer norm, whose gradients are partial under sequence parallelism."""

    def __init__(self, size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.initializers = {"weight": Constant(1.0), "bias": Constant(0.0)}
        if tp.sequence:
            self.token_partial = ("weight", "bias")

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias)


class ToyLayer(nn.Module):
    """x + dropout(row(gelu(column(norm(x))))), with optional recomputation."""

    def __init__(self, size: int, inner: int, *, tp: TensorParallel = SINGLE, recompute: Recompute = "none") -> None:
        super().__init__()
        self.tp, self.recompute = tp, recompute
        self.norm = ToyNorm(size, tp)
        self.column = ColumnParallelLinear(size, inner, init_std=0.5, tp=tp)
        self.row = RowParallelLinear(inner, size, init_std=0.5, tp=tp)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        return recomputed(self._forward, self.recompute, x, keys)

    def _forward(self, x: Tensor, keys: Tensor) -> Tensor:
        # The residual is not part of it, so that the layer ends in its closing collective.
        own = own_share(keys, self.tp) if self.tp.sequence else keys
        x = keyed_dropout(self.norm(x), 0.25, own)
        wide = self.column(x)
        return self.row.finish(recomputed(self._activated_product, self.recompute, wide, at="selective"))

    def _activated_product(self, wide: Tensor) -> Tensor:
        return self.row.product(F.gelu(wide))


class ToyModel(nn.Module):
    """Tokens to numbers: a divided embedding, layers, and the output summed with weights."""

    VOCABULARY, SIZE, INNER = 10, 6, 8

    def __init__(self, *, layers: int = 2, tp: TensorParallel = SINGLE, recompute: Recompute = "none") -> None:
        super().__init__()
        self.tp = tp
        # Padded to 12 rows: shards of data ranks then come out uneven.
        self.embedding = VocabParallelEmbedding(self.VOCABULARY, 12, self.SIZE, init_std=1.0, tp=tp)
        self.layers = nn.ModuleList(ToyLayer(self.SIZE, self.INNER, tp=tp, recompute=recompute) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for number, layer in enumerate(self.layers):
            hidden = hidden + layer(hidden, fold_in(ids, number))
        return gather_from_ranks(hidden, self.tp, dim=0) if self.tp.sequence else hidden

    def loss(self, ids: Tensor) -> Tensor:
        """A sum over tokens that differs by feature."""
        out = self(ids)
        return (out.float().square() * torch.arange(1.0, self.SIZE + 1)).sum()

    def units(self) -> Iterator[nn.Module]:
        """What data parallelism gathers together."""
        return iter(self.layers)
