# SPDX-License-Identifier: Apache-2.0
"""Data parallelism: on flat buffers where weights stay whole, by PyTorch's FSDP2 where they are divided as well."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from parallel.flat_buffers import FlatBuffers
from parallel.mesh import ParallelMesh, Sharding
from parallel.torch_types import is_fsdp_module

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def apply_data_parallel(
    model: nn.Module,
    units: Iterable[nn.Module],
    mesh: ParallelMesh,
    *,
    sharding: Sharding,
    compute_dtype: torch.dtype,
    cast_inputs: bool = True,
    alone: Iterable[nn.Parameter] = (),
) -> None:
    """Prepare a model so that its gradients are summed (not averaged) over the data axis.

    The model computes in ``compute_dtype``; master weights and gradients between steps are float32. Parameters become
    others, and DTensors only where ``full`` or ``hybrid`` divides them.

    Args:
        model: the whole model, or the part of it on this pipeline stage.
        units: the sub-modules whose parameters are gathered together (the layers), in the order they run; several small
            ones at a time where weights stay whole.
        sharding: ``full`` and ``hybrid`` gather each unit's parameters again in every pass; ``optimizer`` divides only
            gradients and optimizer states, and gathers updated weights once per step; ``none`` divides nothing.
        compute_dtype: float32, bfloat16 or float16.
        cast_inputs: with ``full`` and ``hybrid``, give units their inputs in that format too; False leaves activations
            as they are. Elsewhere nothing casts them.
        alone: parameters that another stage has a copy of, which is divided in the same way.
    """
    if mesh.layout.data == 1 or sharding in ("none", "optimizer"):
        _FLAT[model] = FlatBuffers(model, _grouped(units), mesh, compute_dtype, alone)
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # here: see `torch_types`

    policy = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == torch.float32 else compute_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=cast_inputs,
    )
    for unit in units:
        fully_shard(unit, mesh=mesh.data_mesh(), mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh.data_mesh(), mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if is_fsdp_module(module):
            # Losses are divided by global counts before the backward pass, so gradients of the ranks simply add up.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


#: So many parameters are communicated at a time where weights stay whole: few collectives and kernels, and yet 128 MiB
#: of gradients in float32 leave those of a large model to overlap with computation.
_GROUP_PARAMETERS = 2**25


def _grouped(units: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Neighboring units, as many as it takes to reach `_GROUP_PARAMETERS` in each group but the last."""
    groups: list[list[nn.Module]] = []
    size = _GROUP_PARAMETERS
    for unit in units:
        if size >= _GROUP_PARAMETERS:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += sum(parameter.numel() for parameter in unit.parameters())
    return groups


_FLAT: WeakKeyDictionary[nn.Module, FlatBuffers] = WeakKeyDictionary()


def flat_buffers(model: nn.Module) -> FlatBuffers | None:
    """The buffers of a model whose weights stay whole; None for others."""
    return _FLAT.get(model)


def set_gradient_sync(model: nn.Module, last: bool) -> None:
    """Say whether the coming backward pass is the last of the step: only then are gradients reduced."""
    if (flat := flat_buffers(model)) is not None:
        flat.begin_backward(last)
    elif is_fsdp_module(model):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)


@contextmanager
def marking_sums(model: nn.Module, mark: Callable[[], None] | None) -> Iterator[None]:
    """Let a backward pass that is being recorded note where gradients are complete which a sum could begin with.

    Args:
        model: whose weights stay whole.
        mark: called there, for :func:`begin_next_sum` to be called there in a replay; None notes nothing.
    """
    flat = flat_buffers(model)
    with nullcontext() if flat is None or mark is None else flat.marking(mark):
        yield


def begin_next_sum(model: nn.Module) -> None:
    """Begin the next sum over data ranks, if the backward pass that is replayed is the last one of the step."""
    if (flat := flat_buffers(model)) is not None:
        flat.reduce_next()


@contextmanager
def holding_for_weights(model: nn.Module, hold: Callable[[], None] | None) -> Iterator[None]:
    """Let a forward pass that is being recorded note where it needs weights that may be on their way.

    Args:
        model: whose weights stay whole.
        hold: called there, for the next step of :func:`arriving_weights` to be made there in a replay; None notes
            nothing.
    """
    flat = flat_buffers(model)
    with nullcontext() if flat is None or hold is None else flat.holding(hold):
        yield


def arriving_weights(model: nn.Module) -> Iterator[None]:
    """Waits in turn, at every step, for weights that a recorded forward pass holds for."""
    return iter(()) if (flat := flat_buffers(model)) is None else flat.arrivals()


def _parameter_groups(model: FSDPModule) -> Iterator[Any]:
    """FSDP2's groups of parameters: of the root and of every unit.

    Internals of torch (2.11 to 2.13), which its own pipeline schedules use as well; there is no public way.
    """
    for state in model._get_fsdp_state()._state_ctx.all_states:
        single = getattr(state, "_fsdp_param_group", None)
        yield from getattr(state, "_fsdp_param_groups", [] if single is None else [single])


def keep_gradients(model: nn.Module) -> None:
    """Add gradients that were completed after a backward pass to those kept in float32.

    FSDP2 does so in hooks of the backward pass; left to the next of them, gradients of several micro batches would be
    summed in the format of the computation. Those of flat buffers are float32 from the start.
    """
    if is_fsdp_module(model):
        for group in _parameter_groups(model):
            for parameter in group.fsdp_params:
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()


def reduce_gradients(model: nn.Module) -> None:
    """Reduce gradients that were completed after the last backward pass (weight gradients computed on their own).

    FSDP2 reduces in hooks of the backward pass; this runs them by hand, as torch's own pipeline schedules do.
    """
    if (flat := flat_buffers(model)) is not None:
        flat.reduce()
    elif is_fsdp_module(model):
        set_gradient_sync(model, last=True)
        for group in _parameter_groups(model):
            group.post_backward()
        model._get_fsdp_state()._root_post_backward_final_callback()


def finish_gradients(model: nn.Module) -> None:
    """Wait until the gradients of a step are summed over data ranks, after its last backward pass."""
    if (flat := flat_buffers(model)) is not None:
        flat.finish()
