# SPDX-License-Identifier: Apache-2.0
"""Collectives with the gradients tensor parallelism needs.

Each pair is conjugate: the backward of one is the forward of the other (Shoeybi et al., arXiv 1909.08053, figure 3;
Korthikanti et al., arXiv 2205.05198, figure 5). t is the tensor-parallel size, T tokens.

| function              | forward                          | backward                         |
|-----------------------|----------------------------------|----------------------------------|
| copy_to_ranks         | identity                         | all-reduce                       |
| reduce_from_ranks     | all-reduce                       | identity                         |
| gather_from_ranks     | all-gather along a dimension     | own slice                        |
| all_gather_tokens     | all-gather [T/t, ..] -> [T, ..]  | reduce-scatter                   |
| reduce_scatter_tokens | reduce-scatter [T, ..] -> [T/t, ..] | all-gather                    |

``gather_from_ranks`` feeds computation that every rank repeats (its gradient is already whole on each);
``all_gather_tokens`` feeds computation that each rank does a share of (gradients must be summed).

torch's own differentiable all-reduce sums again in the backward, which counts a replicated loss t times; hence these.
They are built on functional collectives, so torch.compile traces them into one graph, and never change their inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parallel.mesh import TensorParallel
from parallel.presence import waits_for_others
from parallel.step_clock import waiting

_functional = torch.ops._c10d_functional
_Work = Callable[..., Tensor]


def start_all_reduce(tensor: Tensor, group_name: str) -> Tensor:
    """Start a sum over the group into a new tensor; read it only after :func:`wait`."""
    return _functional.all_reduce(tensor.contiguous(), "sum", group_name)


def start_all_gather(tensor: Tensor, size: int, group_name: str) -> Tensor:
    """Start gathering ``[n, ..]`` of every rank into ``[size * n, ..]``; read it only after :func:`wait`."""
    return _functional.all_gather_into_tensor(tensor.contiguous(), size, group_name)


def start_reduce_scatter(tensor: Tensor, size: int, group_name: str) -> Tensor:
    """Start summing ``[size * n, ..]`` over the group and keeping this rank's ``[n, ..]``."""
    return _functional.reduce_scatter_tensor(tensor.contiguous(), "sum", size, group_name)


@waits_for_others
def wait(tensor: Tensor) -> Tensor:
    """Wait for a started collective; on CUDA the current stream waits, not the host."""
    if tensor.is_cuda or torch.compiler.is_compiling():
        return _functional.wait_tensor(tensor)
    with waiting():
        return _functional.wait_tensor(tensor)


class _Pair(torch.autograd.Function):
    """A collective whose backward pass is its conjugate: functions of a tensor and of the same place in a group."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, there: _Work, back: _Work, *place: Any) -> Tensor:
        ctx.back, ctx.place = back, place
        return there(tensor, *place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(gradient, *ctx.place), None, None, *(None for _ in ctx.place)


def _same(tensor: Tensor, group_name: str) -> Tensor:  # noqa: ARG001
    return tensor.view_as(tensor)


def _sum(tensor: Tensor, group_name: str) -> Tensor:
    return wait(start_all_reduce(tensor, group_name))


def _slice(tensor: Tensor, dim: int, rank: int, size: int, group_name: str) -> Tensor:  # noqa: ARG001
    length = tensor.shape[dim] // size
    return tensor.narrow(dim, rank * length, length).contiguous()


def _concatenate(tensor: Tensor, dim: int, rank: int, size: int, group_name: str) -> Tensor:  # noqa: ARG001
    gathered = _all_tokens(tensor.movedim(dim, 0), size, group_name)
    return gathered.movedim(0, dim).contiguous()


def _all_tokens(tensor: Tensor, size: int, group_name: str) -> Tensor:
    return wait(start_all_gather(tensor, size, group_name))


def _own_tokens(tensor: Tensor, size: int, group_name: str) -> Tensor:
    return wait(start_reduce_scatter(tensor, size, group_name))


def copy_to_ranks(tensor: Tensor, tp: TensorParallel) -> Tensor:
    """Enter a tensor-parallel region: every rank uses the same tensor, gradients are summed."""
    return tensor if tp.size == 1 else _Pair.apply(tensor, _same, _sum, tp.group_name)


def reduce_from_ranks(tensor: Tensor, tp: TensorParallel) -> Tensor:
    """Leave a tensor-parallel region: sum the ranks' partial results; each rank gets the whole gradient."""
    return tensor if tp.size == 1 else _Pair.apply(tensor, _sum, _same, tp.group_name)


def gather_from_ranks(tensor: Tensor, tp: TensorParallel, dim: int = -1) -> Tensor:
    """Concatenate the ranks' slices along ``dim`` for computation that every rank repeats."""
    if tp.size == 1:
        return tensor
    return _Pair.apply(tensor, _concatenate, _slice, dim % tensor.dim(), tp.rank, tp.size, tp.group_name)


def all_gather_tokens(tensor: Tensor, tp: TensorParallel) -> Tensor:
    """``[T/t, ..]`` of each rank to ``[T, ..]`` on all, for computation that is divided among the ranks."""
    return tensor if tp.size == 1 else _Pair.apply(tensor, _all_tokens, _own_tokens, tp.size, tp.group_name)


def reduce_scatter_tokens(tensor: Tensor, tp: TensorParallel) -> Tensor:
    """Sum partial ``[T, ..]`` over the ranks and keep this rank's ``[T/t, ..]``."""
    return tensor if tp.size == 1 else _Pair.apply(tensor, _own_tokens, _all_tokens, tp.size, tp.group_name)
