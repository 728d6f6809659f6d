# SPDX-License-Identifier: Apache-2.0
"""Parameters with some of their rows or columns, redistributed to the tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parallel.mesh import TensorParallel
from parallel.sharding import copy_whole, sharded_parameter
from parallel.torch_types import is_dtensor


def undivided(tensor: Tensor) -> Tensor:
    """The global tensor, detached; every tensor rank must call."""
    return (tensor.full_tensor() if is_dtensor(tensor) else tensor).detach()


def replaced(parameter: nn.Parameter, values: Tensor, tp: TensorParallel) -> nn.Parameter:
    """A parameter like ``parameter`` (device, type, division) with other global values, perhaps of another size."""
    dim = parameter.placements[0].dim if is_dtensor(parameter) else 0  # type: ignore[attr-defined]
    fresh = sharded_parameter(
        tuple(values.shape),
        tp if is_dtensor(parameter) else TensorParallel(),
        dim=dim,
        device=parameter.device,
        dtype=parameter.dtype,
    )
    copy_whole(fresh, values)
    fresh.requires_grad_(parameter.requires_grad)
    return fresh


def selected(parameter: nn.Parameter, index: Tensor, tp: TensorParallel, *, dim: int) -> nn.Parameter:
    """A parameter with the rows (``dim`` 0) or columns (1) ``index`` of another; every tensor rank must call."""
    return replaced(parameter, undivided(parameter).index_select(dim, index.to(parameter.device)), tp)


def padded(values: Tensor, rows: int) -> Tensor:
    """A tensor with rows of zeros behind its own, ``rows`` in all."""
    if values.shape[0] == rows:
        return values
    return torch.cat((values, values.new_zeros((rows - values.shape[0], *values.shape[1:]))))
