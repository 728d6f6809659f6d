# SPDX-License-Identifier: Apache-2.0
"""quant_mode: integer arithmetic that finds its own ranges in training, and the ranges that transformers' files hold.

:mod:`megatron_bert.convert.ranges` says which are which. Their heads stay in floating point, so there are no ranges for
ours; and embeddings_act1 averages the ranges of two tensors (words with types, and those with positions), so it is
written but not taken over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_bert.convert.ranges import EMBEDDINGS_SUM, their_buffers, their_place
from megatron_bert.convert.state import StateTensor
from megatron_bert.family.pretrained import DocumentedModel
from megatron_bert.ibert.calibration import update_ranges
from megatron_bert.ibert.quantization import in_mode, quantizers

#: Their ranges before anything was seen.
_UNSEEN = 1.1e-5


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Let all modules of a model be in evaluation mode while the block lasts; after it each is as it was before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def follow_training(model: nn.Module) -> None:
    """Let the ranges of a quantized model follow its forward passes in training; in evaluation they stay.

    The first pass in training finds ranges that are not known, from its batch in floating point and without dropout.
    Tensor ranks agree on them; data ranks do not, as forward passes do not know of them.
    """
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)


def _before_forward(model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    if not model.training:
        return
    unknown = [each for _, each in quantizers(model) if not (each.known or each.frozen or each.unused)]
    if unknown:
        with _in_evaluation(model), torch.no_grad(), in_mode(model, "observe"):
            model.forward(*arguments, **named)
    update_ranges(model)
    for quantizer in unknown:  # such as of the head that PEFT trains a copy of
        quantizer.unused = not quantizer.known


def canonical_name(model: nn.Module, name: str) -> str:
    """The name in a pretraining checkpoint of a quantizer, which others than documented models have themselves."""
    owner, _, rest = name.rpartition(".ranges.")
    place = model.names.place(owner) if isinstance(model, DocumentedModel) else None
    return name if place is None else f"{place.owner}.ranges.{rest}"


def read_their_ranges(model: DocumentedModel, stored: Mapping[str, Tensor | StateTensor]) -> None:
    """Take over the ranges of transformers' quantized layers, by their names, where they have seen anything."""
    found = {model.names.inside(key): value for key, value in stored.items() if model.names.is_range(key)}

    def limit(name: str) -> float:
        value = found[name]
        return float(value if isinstance(value, Tensor) else value.load())

    for name, quantizer in quantizers(model):
        place = their_place(canonical_name(model, name)) or EMBEDDINGS_SUM
        if not place.endswith(EMBEDDINGS_SUM) and f"{place}.x_min" in found and f"{place}.x_max" in found:
            least, most = limit(f"{place}.x_min"), limit(f"{place}.x_max")
            largest = most if quantizer.kind == "gelu" else max(-least, most)
            if largest > _UNSEEN:
                quantizer.range.fill_(largest)


def blank_buffer(name: str) -> float:
    """What a buffer of transformers' quantized layers holds before anything was seen."""
    return {"x_min": -1e-5, "x_max": 1e-5}.get(name.rpartition(".")[2], 0.0)


def their_ranges(model: DocumentedModel) -> dict[str, Tensor]:
    """The ranges as transformers' quantized layers have them, by their names."""
    limits = {canonical_name(model, name): quantizer.limit() for name, quantizer in quantizers(model)}
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return {f"{prefix}{place}": values for place, values in their_buffers(limits).items()}
