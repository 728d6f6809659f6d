# SPDX-License-Identifier: Apache-2.0
"""Heads in integer arithmetic: pooler, dense heads and the masked-language head.

Each reads the residual stream (or the pooler's output), rounds it to 8 bits, and gives multiples of a power of two:
logits have 12 fraction bits whatever the scale of a row of weights, so that their order is that of int32 numbers.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron_bert.ibert.activations import INTEGER_ACTIVATIONS
from megatron_bert.ibert.bounds import LOGIT_BITS
from megatron_bert.ibert.epilogues import (
    Target,
    activation_requantized,
    dequantized,
    requantized,
    rescale,
    tanh_requantized,
)
from megatron_bert.ibert.fixed_point import dyadic
from megatron_bert.ibert.modules import Quantized
from megatron_bert.ibert.settings import QuantizationConfig
from megatron_bert.model.activations import ACTIVATIONS
from megatron_bert.model.effective_weights import effective_weight
from megatron_bert.model.heads import Dense, MaskedLanguageHead, Pooler
from parallel.collectives import copy_to_ranks
from parallel.sharding import local_tensor

#: Bounds of logits: 25 bits with the sign, which float32 holds.
_LOGITS = Target(-(2**24) + 1, 2**24 - 1, 2.0**-LOGIT_BITS, real=True)


def logits(sums: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """Accumulators of scale ``scale`` to multiples of 2^-12."""
    factor = dyadic(scale * 2.0**LOGIT_BITS)
    return requantized(sums, bias, rescale(factor, None if bias is None else bias.detach(), scale), _LOGITS)


class QuantizedDense(Quantized, Dense):
    """A dense head: logits."""

    def quantize(self, settings: QuantizationConfig) -> None:
        """Begin as a quantized module."""
        self.adopt(settings, {"input": "signed"}, settings.dequantized())

    def forward(self, x: Tensor) -> Tensor:
        """``[N, K]`` real values to ``[N, out_features]``, multiples of 2^-12."""
        if self.mode != "integer":
            return Dense.forward(self, self.floating(self.observe("input", x) if self.mode == "observe" else x)).float()
        sums, scale = self.multiply(self.read(x, "input"), self.weight, "input")
        return logits(sums, self.bias, scale)


class QuantizedPooler(Quantized, Pooler):
    """Dense and tanh of first tokens."""

    def quantize(self, settings: QuantizationConfig) -> None:
        """Begin as a quantized module."""
        self.adopt(settings, {"input": "signed"}, settings.dequantized())

    def forward(self, x: Tensor) -> Tensor:
        """``[N, H]`` real values to ``[N, H]``, multiples of 2^-15."""
        if self.mode != "integer":
            return Pooler.forward(
                self, self.floating(self.observe("input", x) if self.mode == "observe" else x)
            ).float()
        sums, scale = self.multiply(self.read(x, "input"), self.weight, "input")
        return tanh_requantized(sums, self.bias, scale)


class QuantizedMaskedLanguageHead(Quantized, MaskedLanguageHead):
    """Dense, GELU, norm and the product with the word embeddings."""

    def quantize(self, settings: QuantizationConfig) -> None:
        """Begin as a quantized module."""
        self.adopt(settings, {"input": "signed", "gelu": "stream", "features": "signed"}, settings.dequantized())

    def forward(self, selected: Tensor, word_embeddings: Tensor | None = None) -> Tensor:
        """As MaskedLanguageHead; multiples of 2^-12. Heads of public classes have the output matrix themselves."""
        if word_embeddings is None:
            word_embeddings = effective_weight(self.get_submodule("decoder"))
        if self.mode == "float":
            return MaskedLanguageHead.forward(self, self.floating(selected), word_embeddings).float()
        if self.mode == "observe":
            wide = ACTIVATIONS[self.hidden_act](self.dense(self.floating(self.observe("input", selected))))
            features = self.observe("features", self.norm(self.observe("gelu", wide)))
            entered = copy_to_ranks(features, self.tp)
            return F.linear(entered, local_tensor(word_embeddings), local_tensor(self.bias)).float()
        gelu = self.quantizer("gelu")
        sums, scale = self.multiply(self.read(selected, "input"), effective_weight(self.dense), "input")
        if "gelu" in self.force:
            wide = self.read(ACTIVATIONS[self.hidden_act](dequantized(sums, scale, self.dense.bias)), "gelu")
        else:
            activation = INTEGER_ACTIVATIONS[self.hidden_act]
            wide = activation_requantized(sums, self.dense.bias, scale, gelu.target(), activation)
            gelu.used(wide)
        features = self.normalize(self.norm, wide, "gelu", "features")
        sums, scale = self.multiply(copy_to_ranks(features, self.tp), word_embeddings, "features")
        return logits(sums, local_tensor(self.bias), scale)
