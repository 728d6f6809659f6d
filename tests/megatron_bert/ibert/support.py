# SPDX-License-Identifier: Apache-2.0
"""Quantized micro models, and what their quantizers saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_bert.ibert import QuantizationConfig, Quantizer, calibrate, quantize_model, quantizers
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.encoder import BertEmbeddings, Encoder
from megatron_bert.model.sequences import SequenceLayout
from parallel.mesh import SINGLE, TensorParallel
from parallel.sharding import initialize


class Stack(torch.nn.Module):
    """Embeddings and encoder, from token ids and a layout to final hidden states ``[T, H]``."""

    def __init__(self, config: MegatronBertConfig, tp: TensorParallel = SINGLE) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config, tp=tp)
        self.encoder = Encoder(config, tp=tp)
        initialize(self, 5)

    def forward(self, tokens: Tensor, positions: Tensor, layout: SequenceLayout) -> Tensor:
        hidden = self.embeddings(tokens, positions, torch.zeros_like(tokens), None)
        return self.encoder(hidden, layout, None)


#: Of a narrow stack whose parts all matter in its result.
SIZES = {
    "vocab_size": 90,
    "vocab_size_multiple": 32,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.25,
    "scaled_output_init": False,
}


def make_stack(placement: str, layers: int = 12, **changes: Any) -> Stack:
    """A narrow stack."""
    own = {"num_hidden_layers": layers, "layer_norm_placement": placement}
    stack = Stack(MegatronBertConfig(**(SIZES | own | changes)))
    with torch.no_grad():
        for parameter in stack.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return stack.eval()


def sequences(*lengths: int) -> tuple[list[Tensor], int]:
    """Token ids of sequences, and the longest length."""
    return [torch.randint(0, 90, (length,)) for length in lengths], max(lengths)


def padded(ids: list[Tensor], longest: int) -> tuple[Tensor, Tensor, SequenceLayout]:
    """Sequences as a rectangle with a mask."""
    tokens = torch.zeros(len(ids), longest, dtype=torch.int64)
    real = torch.zeros(len(ids), longest, dtype=torch.bool)
    for row, one in enumerate(ids):
        tokens[row, : len(one)], real[row, : len(one)] = one, True
    positions = torch.arange(longest).repeat(len(ids))
    return tokens.flatten(), positions, SequenceLayout.rectangle(len(ids), longest, real)


def packed(ids: list[Tensor], longest: int) -> tuple[Tensor, Tensor, SequenceLayout]:
    """Sequences end to end."""
    lengths = torch.tensor([len(one) for one in ids])
    positions = torch.cat([torch.arange(len(one)) for one in ids])
    return torch.cat(ids), positions, SequenceLayout.packed(lengths, longest)


def quantized_stack(placement: str, layers: int = 12, settings: QuantizationConfig | None = None) -> Stack:
    """A stack, quantized and calibrated on random sequences."""
    stack = make_stack(placement, layers)
    quantize_model(stack, settings or QuantizationConfig())
    calibrate(stack, [padded(*sequences(40, 25, 3))], lambda batch: stack(*batch))
    return stack


def tensors_of(model: torch.nn.Module, run: Callable[[], Any]) -> dict[str, Tensor]:
    """Every tensor between quantizers while ``run`` runs, as float64 integers by the quantizer's name.

    Tensors of the residual stream are divided by their power of two, which is exact.
    """
    found: dict[str, Tensor] = {}
    names = {quantizer: name for name, quantizer in quantizers(model)}

    def tap(quantizer: Quantizer, q: Tensor) -> None:
        found[names[quantizer]] = q.double() / quantizer.target().unit

    for quantizer in names:
        quantizer.tap = tap
    run()
    for quantizer in names:
        quantizer.tap = None
    return found
