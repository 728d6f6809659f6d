# SPDX-License-Identifier: Apache-2.0
"""Factors per channel moved from a norm into the matrix that follows it, which changes nothing in the float model.

A norm's gain gives some channels of its output a larger range than others, and one scale serves them all. Divided by a
factor per channel, and the matrix' columns multiplied with it, the product is the same function. With post-layer-norm
the norm's output is the residual stream too, so there it would not be.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bert.model.encoder import Encoder
from megatron_bert.model.layer import LayerNorm
from parallel.errors import UserError
from parallel.gradients import raw_local
from parallel.layers import ColumnParallelLinear
from parallel.mesh import TensorParallel

#: Channels are not divided by less than this share of the largest factor.
_LEAST = 1e-3
#: How large a normalized element is thought to be when ranges of channels are estimated from gain and bias.
_TYPICAL_PEAK = 4.0


@torch.no_grad()
def equalize_model(encoders: Iterable[Encoder], kind: str) -> None:
    """Equalize every norm of pre-layer-norm layers with the matrix that reads it.

    Args:
        encoders: whose parameters hold values, and are not divided by data parallelism.
        kind: ``none``; ``gamma``, the factor is the gain's magnitude; ``smooth``, the root of the channel's range over
            that of its column (SmoothQuant's balance, arXiv 2211.10438, with ranges estimated from gain and bias); or
            ``auto``, which is ``smooth`` with pre-layer-norm, else none.

    Raises:
        UserError: post-layer-norm, where this cannot be done.
    """
    if kind == "none":
        return
    for encoder in encoders:
        for layer in encoder.layer_list():
            if layer.post_norm:
                if kind == "auto":
                    continue
                raise UserError(
                    f"equalization is {kind!r}, but the norms of post-layer-norm feed the residual stream too: set it "
                    "to none"
                )
            for norm, linear in (
                (layer.attention_norm, layer.attention.query_key_value),
                (layer.mlp_norm, layer.mlp.intermediate),
            ):
                _move(norm, linear, _factors(norm, linear, "smooth" if kind == "auto" else kind, layer.tp))


def _factors(norm: LayerNorm, linear: ColumnParallelLinear, kind: str, tp: TensorParallel) -> Tensor:
    """What a channel is divided by, ``[H]``; the same on every tensor rank."""
    gain = norm.weight.abs()
    if kind == "gamma":
        if not gain.any():
            return torch.ones_like(gain)
        return gain.clamp(min=float(gain.max()) * _LEAST)
    columns = torch.stack([raw_local(part.weight).abs().amax(0) for part in _parts(linear)]).amax(0)
    if tp.size > 1:
        dist.all_reduce(columns, op=dist.ReduceOp.MAX, group=tp.group)
    ranges = gain * _TYPICAL_PEAK + norm.bias.abs()
    if not (ranges.any() and columns.any()):  # there is nothing to balance
        return torch.ones_like(gain)
    ranges, columns = (t.clamp(min=float(t.max()) * _LEAST) for t in (ranges, columns))
    return (ranges / columns).sqrt()


def _move(norm: LayerNorm, linear: ColumnParallelLinear, factors: Tensor) -> None:
    parameter: nn.Parameter
    for parameter in (norm.weight, norm.bias):
        parameter.div_(factors)
    for part in _parts(linear):
        raw_local(part.weight).mul_(factors)


def _parts(linear: ColumnParallelLinear) -> list[ColumnParallelLinear]:
    """The layers that one stands for, where their parameters are apart."""
    return getattr(linear, "layers", [linear])
