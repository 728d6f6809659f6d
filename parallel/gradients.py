"""What happens to gradients between the last backward pass and the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.mesh import ParallelMesh, TensorParallel
from parallel.sharding import ParallelModule


def raw_local(tensor: Tensor) -> Tensor:
    """This rank's storage of a parameter or gradient, outside autograd."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def token_partial_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Replicated parameters that saw only this rank's tokens (sequence parallelism), in module order."""
    for module in model.modules():
        if isinstance(module, ParallelModule):
            for name in module.token_partial:
                yield getattr(module, name)


@torch.no_grad()
def sum_token_partial_gradients(model: nn.Module, tp: TensorParallel) -> None:
    """Complete the gradients of :func:`token_partial_parameters` by one all-reduce over the tensor ranks.

    Called once a step, after the last backward pass: sums over micro batches and data ranks commute with it.
    """
    if not tp.sequence:
        return
    gradients = [raw_local(p.grad) for p in token_partial_parameters(model) if p.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=tp.group)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def replicated_axes(parameter: Tensor) -> set[str]:
    """The axes of a (tensor x data) plane over which a parameter is copied; the others divide it."""
    sharded: set[str] = set()
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names or ()
        sharded = {
            name for name, placement in zip(names, parameter.placements, strict=True) if not placement.is_replicate()
        }
    return {"tensor", "data_replicate", "data_shard"} - sharded


def counted_here(parameter: Tensor, mesh: ParallelMesh) -> bool:
    """Whether this rank's part of a parameter is the one that stands for its copies on other ranks.

    Every element of every parameter is counted on exactly one rank of a (tensor x data) plane.
    """
    return all(mesh.coordinate[axis] == 0 for axis in replicated_axes(parameter))


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    if tensors[0].is_cuda:
        return list(torch._foreach_norm(tensors))
    # On the CPU torch adds up millions of squares in a few float32 accumulators and loses the fourth digit; norms of
    # rows first keep six at twice the (small) time.
    rows = [torch.linalg.vector_norm(tensor, dim=-1) if tensor.dim() > 1 else tensor for tensor in tensors]
    return [torch.linalg.vector_norm(row) for row in rows]


@torch.no_grad()
def global_gradient_norm(
    parameters: Iterable[nn.Parameter], mesh: ParallelMesh, losses: Tensor | None = None
) -> Tensor:
    """The L2 norm of the whole model's gradient, a float32 scalar that is the same on every rank.

    Args:
        parameters: this rank's parameters, without second copies of tied ones.
        mesh: where the run is laid out; all its ranks must call.
        losses: of this rank; where one of them is not finite, the norm is NaN on every rank.
    """
    gradients = [raw_local(p.grad) for p in parameters if p.grad is not None and counted_here(p, mesh)]
    gradients = [gradient for gradient in gradients if gradient.numel()]
    total = torch.zeros((), device=mesh.device)
    if gradients:
        total = torch.stack(_norms(gradients)).float().square().sum()
    if losses is not None:
        total = total + 0.0 * losses.sum()
    return mesh.all_reduce(total, ("tensor", "data_shard", "data_replicate", "pipeline")).sqrt()


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply every gradient by a scalar tensor, without asking the device for its value."""
    gradients = [raw_local(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def clip_factor(norm: Tensor, maximum: float) -> Tensor:
    """The factor that brings a gradient of this norm down to ``maximum``, at most 1."""
    return (maximum / (norm + 1e-6)).clamp(max=1.0)
