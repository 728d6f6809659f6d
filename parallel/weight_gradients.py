# SPDX-License-Identifier: Apache-2.0
"""Weight gradients computed later than input gradients, for zero-bubble schedules.

A zero-bubble schedule (Qi et al., arXiv 2401.10241) runs the backward pass of a stage in two actions: first the
gradient of the stage's input, which the stage before waits for, then the gradients of its weights. The weights that
count are those of the parallel layers' matrix products. While a :class:`WeightGradientQueue` is active, these layers
leave the weight half of their backward pass in it, so that each matrix product runs exactly once, whenever the
schedule says.

Small parameters (norms, biases, embeddings) get their gradients in the first half, from autograd as always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.first_order import in_place
from parallel.sharding import local_tensor
from parallel.torch_types import is_dtensor


class WeightGradientQueue:
    """Weight gradients of one stage and microbatch that are still to be computed."""

    def __init__(self) -> None:
        self._work: list[Callable[[], None]] = []

    def push(self, work: Callable[[], None]) -> None:
        """Leave work for later."""
        self._work.append(work)

    def run(self) -> None:
        """Do the work and forget it, with what it held on to."""
        work, self._work = self._work, []
        with torch.no_grad():
            for compute in work:
                compute()


_active: WeightGradientQueue | None = None


@contextmanager
def deferring(queue: WeightGradientQueue | None) -> Iterator[None]:
    """Let the parallel layers leave weight gradients in ``queue`` while the block lasts; None changes nothing.

    Wraps the forward pass of a stage and the input half of its backward pass (recomputation runs the forward pass
    there). The variable is the process's, not the thread's: autograd recomputes on threads of its own.
    """
    global _active
    before, _active = _active, queue
    try:
        yield
    finally:
        _active = before


def active_queue() -> WeightGradientQueue | None:
    """The queue weight gradients go to; None to compute them at once."""
    return _active


def add_in_place(parameter: torch.nn.Parameter) -> None:
    """Say that a parameter's gradient stays where it is, and that nobody waits for it to be complete."""
    parameter.adds_in_place = True  # type: ignore[attr-defined]


def adds_in_place(weight: Tensor) -> bool:
    """Whether a backward pass adds to a weight's gradient itself: :func:`add_in_place` and ``in_place`` say so."""
    return getattr(weight, "adds_in_place", False) and in_place(weight)


class _AddedLinear(torch.autograd.Function):
    """``y = x W^T + b`` whose weight gradient is added where it is kept, by the product itself.

    Autograd would make a gradient of its own, and read, add and write it in another pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        ctx.weight.grad.addmm_(rows.t(), x.flatten(0, -2))
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        return of_x, None, rows.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b``, whose weight gradient is added where it is kept where it :func:`adds_in_place`.

    Args:
        x: ``[.., K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
    """
    if adds_in_place(weight):
        out: Tensor = _AddedLinear.apply(x, weight, bias)
        return out
    return F.linear(x, weight, bias)


def accumulate_gradient(parameter: Tensor, local_gradient: Tensor) -> None:
    """Add this rank's part of a gradient to ``parameter.grad``, as autograd would have."""
    if parameter.grad is not None:
        local_tensor(parameter.grad).add_(local_gradient)
    elif is_dtensor(parameter):
        parameter.grad = type(parameter).from_local(
            local_gradient,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    else:
        parameter.grad = local_gradient


class _DeferredLinear(torch.autograd.Function):
    """``y = x W^T`` whose weight gradient goes to a queue.

    forward: GEMM. Backward: the input gradient's GEMM; the weight gradient's is queued.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, accumulate: Callable[[Tensor], None], queue: WeightGradientQueue
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.accumulate, ctx.queue = accumulate, queue
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        x = x.detach()  # the numbers alone, not the graph that led to them
        accumulate = ctx.accumulate
        ctx.queue.push(lambda: accumulate(gradient.flatten(0, -2).t() @ x.flatten(0, -2)))
        return (gradient @ weight if ctx.needs_input_grad[0] else None), None, None, None


def deferred_linear(x: Tensor, weight: Tensor, local_weight: Tensor, queue: WeightGradientQueue) -> Tensor:
    """``x W^T`` with the weight gradient left to ``queue``.

    Args:
        x: ``[T, K]``.
        weight: the parameter whose gradient it is.
        local_weight: this rank's part of it, ``[N, K]``.
        queue: where the weight gradient goes.
    """
    # In a function, the parameter is hidden from autograd, which would otherwise track it as an input.
    return _DeferredLinear.apply(x, local_weight.detach(), partial(accumulate_gradient, weight), queue)
