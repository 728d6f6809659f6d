# SPDX-License-Identifier: Apache-2.0
"""What happens to gradients between the last backward pass and the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import ParallelMesh, TensorParallel
from parallel.sharding import ParallelModule, local_tensor

#: Elements whose squares are added up before their sums are.
_ROW = 4096


def raw_local(tensor: Tensor) -> Tensor:
    """This rank's storage of a parameter or gradient, outside autograd."""
    return local_tensor(tensor).detach()


def set_own_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Say which part of a parameter's gradient this rank has the sum over data ranks of, if not all of it."""
    parameter.own_gradient = gradient  # type: ignore[attr-defined]


def own_gradient(parameter: nn.Parameter) -> Tensor | None:
    """This rank's part of a gradient that is summed over data ranks; None where there is none."""
    own: Tensor | None = getattr(parameter, "own_gradient", None)
    if own is not None:
        return own
    return None if parameter.grad is None else raw_local(parameter.grad)


def token_partial_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Replicated parameters that saw only this rank's tokens (sequence parallelism), in module order."""
    for module in model.modules():
        if isinstance(module, ParallelModule):
            for name in module.token_partial:
                yield getattr(module, name)


@torch.no_grad()
def sum_token_partial_gradients(model: nn.Module, tp: TensorParallel) -> None:
    """Complete the gradients of :func:`token_partial_parameters` by one all-reduce over the tensor ranks.

    Called once per step, after the last backward pass: sums over micro batches and data ranks commute with it.
    """
    if not tp.sequence:
        return
    own = (own_gradient(parameter) for parameter in token_partial_parameters(model))
    gradients = [gradient for gradient in own if gradient is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=tp.group)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def _norms_of_rows(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    whole = flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=-1)
    return torch.cat([rows, torch.linalg.vector_norm(flat[whole:]).view(1)]) if whole else flat


def sums_of_squares(tensors: list[Tensor]) -> Tensor:
    """Of each tensor, float32 ``[tensors]``; none of them is empty."""
    if tensors[0].is_cuda:
        norms = list(torch._foreach_norm(tensors))
    else:
        # On the CPU torch adds up millions of squares in a few float32 accumulators and loses the fourth digit; norms
        # of rows first keep six at twice the (small) time.
        norms = [torch.linalg.vector_norm(_norms_of_rows(tensor)) for tensor in tensors]
    return torch.stack(norms).float().square()


@torch.no_grad()
def global_gradient_norm(gradients: Iterable[Tensor], mesh: ParallelMesh, losses: Tensor | None = None) -> Tensor:
    """The L2 norm of the whole model's gradient, a float32 scalar that is the same on every rank.

    All ranks of the mesh must call.

    Args:
        gradients: of this rank, those that stand for their copies on others and on this one.
        losses: of this rank; where one of them is not finite, the norm is NaN on every rank.
    """
    gradients = [gradient for gradient in gradients if gradient.numel()]
    total = sums_of_squares(gradients).sum() if gradients else torch.zeros((), device=mesh.device)
    if losses is not None:
        total = total + 0.0 * losses.sum()
    return mesh.all_reduce(total, ("tensor", "data_shard", "data_replicate", "pipeline")).sqrt()


def clip_factor(norm: Tensor, maximum: float) -> Tensor:
    """The factor that brings a gradient of this norm down to ``maximum``, at most 1."""
    return (maximum / (norm + 1e-6)).clamp(max=1.0)
