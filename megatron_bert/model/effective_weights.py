# SPDX-License-Identifier: Apache-2.0
"""The weight that a linear layer computes with, for code that multiplies by it without calling the layer.

PEFT wraps a layer in another that adds adapters to its result. Where those are a change of the weight, the sum is the
weight that counts; PEFT itself is not needed to see that.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megatron_bert.model.heads import Dense
from parallel.errors import UserError
from parallel.layers import ColumnParallelLinear, RowParallelLinear

_PLAIN = tuple(kind.forward for kind in (nn.Linear, Dense, ColumnParallelLinear, RowParallelLinear))
_REMEDY = "merge the adapters first (merge_and_unload), or set quant_mode to false"


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer of PEFT around another."""
    return hasattr(module, "base_layer") and hasattr(module, "active_adapters")


def effective_weight(linear: nn.Module) -> Tensor:
    """The weight ``[N, K]`` of a layer with its active adapters, which get gradients through it.

    Adapters are added one by one as PEFT merges them, which gives the bits of the merged layer.

    Raises:
        UserError: the layer computes something else than a product with a weight.
    """
    if is_adapted(linear):
        return _adapted_weight(linear)
    weight = getattr(linear, "weight", None)
    if type(linear).forward not in _PLAIN or not isinstance(weight, Tensor):
        raise UserError(
            f"a linear layer was replaced by {type(linear).__name__}, but integer layers read the weight of a plain "
            "linear layer: put nn.Linear back, or set quant_mode to false"
        )
    return weight


def _adapted_weight(layer: Any) -> Tensor:
    weight = effective_weight(layer.base_layer)
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its forward pass does
    if layer.disable_adapters or layer.merged:
        return weight
    if not (hasattr(layer, "lora_A") and hasattr(layer, "get_delta_weight")):
        kind = type(layer).__module__
        raise UserError(f"adapters of {kind} are not LoRA, the only kind that integer layers apply: {_REMEDY}")
    if layer._forward_pre_hooks:  # how PEFT passes adapter_names
        raise UserError(f"adapter_names is given, but integer layers have one weight for all samples: {_REMEDY}")
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        # Versions of PEFT differ in which of these there are.
        variant, with_dora, with_bias = (getattr(layer, kind, {}) for kind in ("lora_variant", "use_dora", "lora_bias"))
        if name in variant or with_dora.get(name):
            kind = type(variant.get(name)).__name__ if name in variant else "DoRA"
            raise UserError(f"adapter {name} is a LoRA variant ({kind}), which integer layers do not apply: {_REMEDY}")
        if with_bias.get(name):
            raise UserError(f"adapter {name} has lora_bias, which integer layers do not apply: {_REMEDY}")
        if layer.training and getattr(layer.lora_dropout[name], "p", 0.0) > 0.0:
            raise UserError(f"adapter {name} has lora_dropout, which integer layers do not apply: set it to 0")
        weight = (weight + layer.get_delta_weight(name)).to(weight.dtype)
    return weight
