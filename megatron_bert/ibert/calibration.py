# SPDX-License-Identifier: Apache-2.0
"""Ranges from data: observation, the agreement of ranks, freezing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bert.ibert.layer import QuantizedTransformerLayer
from megatron_bert.ibert.observers import BINS
from megatron_bert.ibert.quantization import in_mode, quantizers
from megatron_bert.ibert.quantizer import Quantizer
from parallel.errors import UserError


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    groups: Sequence[dist.ProcessGroup] = (),
) -> int:
    """Find ranges: run the float model over some batches and let every quantizer see its tensor.

    Dropout must be off. Ranks of the groups must hold the same part of the model and see the same number of batches.

    Args:
        model: quantized; its ranges are overwritten.
        batches: of data like that of training; a few hundred sequences suffice.
        forward: runs the model on one of them.
        groups: over whose ranks what was seen is put together: see :func:`update_ranges`.

    Returns:
        The number of batches.

    Raises:
        UserError: there was no batch.
    """
    for _, quantizer in quantizers(model):
        quantizer.restart()
    count = 0
    with in_mode(model, "observe"):
        for batch in batches:
            forward(batch)
            update_ranges(model, groups)
            count += 1
    if count == 0:
        raise UserError("there is no data to calibrate ranges on: give at least one batch")
    return count


@torch.no_grad()
def update_ranges(model: nn.Module, groups: Sequence[dist.ProcessGroup] = ()) -> None:
    """Move ranges to what was seen since the last call: in training once per step, before or after the optimizer's.

    Until then a step uses the ranges it began with, so micro batches, recomputation and the order of ranks do not
    matter. Every rank of the groups must call; then its ranges are those of all.

    Args:
        model: quantized.
        groups: one after another, the ranks whose observations count as one: those of the data axes. The model's tensor
            ranks always do. Two small reductions each, whatever the number of quantizers.
    """
    groups = [*groups, *(group for group in _tensor_groups(model) if group not in groups)]
    found = [quantizer for _, quantizer in quantizers(model) if not quantizer.frozen]
    for kind, op in (("min_max", dist.ReduceOp.MAX), ("histogram", dist.ReduceOp.SUM)):
        chosen = [q for q in found if (q.observer == "min_max") == (kind == "min_max")]
        _agree(chosen, kind, op, groups)
    for quantizer in found:
        quantizer.follow()


def _tensor_groups(model: nn.Module) -> list[dist.ProcessGroup]:
    """The group of the model's tensor ranks, whose layers must have the same ranges; none if there is one rank."""
    for module in model.modules():
        if isinstance(module, QuantizedTransformerLayer):
            return [module.tp.group] if module.tp.size > 1 else []
    return []


def _agree(
    chosen: list[Quantizer], kind: str, op: dist.ReduceOp.RedOpType, groups: Sequence[dist.ProcessGroup]
) -> None:
    if not chosen or not groups:
        return
    size = 1 if kind == "min_max" else BINS
    dtype = torch.float32 if kind == "min_max" else torch.int64
    device = chosen[0].range.device
    nothing = torch.full((size,), -1 if kind == "min_max" else 0, dtype=dtype, device=device)
    flat = torch.cat([nothing if q.pending is None else q.pending.to(dtype).reshape(-1) for q in chosen])
    for group in groups:
        dist.all_reduce(flat, op=op, group=group)
    for quantizer, seen in zip(chosen, flat.split(size), strict=True):
        anything = bool((seen >= 0).all()) if kind == "min_max" else bool(seen.any())
        quantizer.pending = _shaped(seen, size) if anything else None


def _shaped(seen: Tensor, size: int) -> Tensor:
    return seen.reshape(()) if size == 1 else seen


def freeze_ranges(model: nn.Module) -> None:
    """Fix the ranges, as evaluation and export need them."""
    for _, quantizer in quantizers(model):
        quantizer.frozen, quantizer.pending = True, None


def unfreeze_ranges(model: nn.Module) -> None:
    """Let the ranges of ``min_max`` observers follow training again, batch by batch.

    Ranges of the other observers come from a histogram of calibration and do not move in training.
    """
    for _, quantizer in quantizers(model):
        quantizer.frozen = False
