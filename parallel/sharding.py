# SPDX-License-Identifier: Apache-2.0
"""Parameters that live in shards, and initial values that do not depend on the layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.errors import ArgumentError
from parallel.mesh import TensorParallel
from parallel.parts import Part
from parallel.torch_types import is_dtensor


@dataclass(frozen=True)
class Normal:
    """Initial values drawn from N(0, std^2).

    Attributes:
        rows: number of leading rows that are real; the rows after them (padding of a vocabulary) are zero.
    """

    std: float
    rows: int | None = None


@dataclass(frozen=True)
class Constant:
    """Initial values all alike."""

    value: float


Initializer = Normal | Constant


class ParallelModule(nn.Module):
    """A module that says how its own parameters start and which of them see only a share of the tokens.

    Attributes:
        initializers: parameter name -> initial values, for the parameters held by this very module.
        token_partial: names of replicated parameters that are used on this rank's share of the tokens only (under
            sequence parallelism), so that their gradients are partial sums over the tensor ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.initializers: dict[str, Initializer] = {}
        self.token_partial: tuple[str, ...] = ()


def local_size(total: int, tp: TensorParallel, what: str) -> int:
    """``total / tp.size``.

    Raises:
        UserError: it does not divide; ``what`` names the quantity.
    """
    if total % tp.size:
        raise ArgumentError(
            f"{what} is {total}, which a tensor-parallel size of {tp.size} does not divide: choose one that does"
        )
    return total // tp.size


def sharded_parameter(
    shape: tuple[int, ...],
    tp: TensorParallel,
    *,
    dim: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Parameter:
    """A parameter of global ``shape`` of which this rank holds one slice along ``dim``.

    At tensor size 1 it is a plain parameter. Otherwise it is a DTensor, so that FSDP and the distributed checkpoint
    know the global tensor: plain slices under one name would silently overwrite each other in a checkpoint.
    """
    local_shape = list(shape)
    local_shape[dim] = local_size(shape[dim], tp, f"dimension {dim} of a parameter of shape {tuple(shape)}")
    local = torch.empty(local_shape, device=device, dtype=dtype)
    if tp.size == 1:
        return nn.Parameter(local)
    assert tp.mesh is not None
    from torch.distributed.tensor import DTensor, Shard  # here: see `torch_types`

    return nn.Parameter(
        DTensor.from_local(
            local,
            tp.mesh,
            [Shard(dim)],
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )
    )


def local_tensor(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, differentiable; layers take it once per use."""
    return parameter.to_local() if is_dtensor(parameter) else parameter


@torch.no_grad()
def copy_whole(parameter: Tensor, values: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this rank's part of it into one that is divided.

    Args:
        parameter: plain, or a DTensor over any mesh and placements.
        values: of the global shape, in any floating-point format.
    """
    if local_tensor(parameter).numel():
        for (offsets, sizes), block in Part.of(parameter).blocks():
            block.copy_(values[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))])


def own_parameters(module: nn.Module) -> Iterator[tuple[str, ParallelModule, str, nn.Parameter]]:
    """Every parameter with its full name, the module that holds it and its name there.

    Raises:
        TypeError: a parameter belongs to a module that does not say how it starts.
    """
    for prefix, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            if not isinstance(child, ParallelModule):
                raise TypeError(f"{prefix or type(child).__name__} holds parameters but is not a ParallelModule")
            yield (f"{prefix}.{name}" if prefix else name), child, name, parameter


def name_seed(seed: int, name: str) -> int:
    """A 63-bit seed for one named tensor of one run."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@torch.no_grad()
def initialize(module: nn.Module, seed: int, *, prefix: str = "") -> None:
    """Give every parameter its initial values: a function of (seed, global name, global index) alone.

    Each tensor is drawn whole on the CPU from a generator of its own and this rank's slice copied out, so that
    gathered weights are equal bit for bit at any tensor, pipeline or data size and on any device.

    Args:
        module: a ParallelModule tree, not yet wrapped for data parallelism.
        prefix: global name of ``module``, empty or ending in a dot, when it is a part of a larger model.

    Raises:
        TypeError: a module holds a parameter it does not say how to start.
    """
    for name, owner, key, parameter in own_parameters(module):
        initializer = owner.initializers.get(key)
        if initializer is None:
            raise TypeError(f"{prefix}{name} has no initializer")
        if isinstance(initializer, Constant):
            local_tensor(parameter).fill_(initializer.value)
            continue
        generator = torch.Generator().manual_seed(name_seed(seed, prefix + name))
        full = torch.zeros(parameter.shape)
        full[: initializer.rows].normal_(0.0, initializer.std, generator=generator)
        copy_whole(parameter, full)
