# SPDX-License-Identifier: Apache-2.0
"""What quantized modules share: their ranges, their mode, and linear layers and norms of integers."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bert.ibert.epilogues import quantized
from megatron_bert.ibert.products import integer_product, quantize_weight, sum_over_ranks
from megatron_bert.ibert.quantizer import Kind, Quantizer, Ranges
from megatron_bert.ibert.settings import QuantizationConfig
from megatron_bert.ibert.stream import normalized_stream
from megatron_bert.model.layer import LayerNorm
from parallel.errors import UserError
from parallel.mesh import TensorParallel
from parallel.sharding import local_tensor

#: ``integer``: as the specification says. ``float``: as before quantization. ``observe``: the same, and quantizers see
#: the tensors they stand for.
Mode = Literal["integer", "float", "observe"]


class Quantized(nn.Module):
    """A module that was quantized in place: its class changed, its parameters and its place in the model did not.

    Attributes:
        settings: bit widths and exceptions.
        mode: what the forward pass computes.
        ranges: quantizers by name.
    """

    settings: QuantizationConfig
    mode: Mode
    ranges: Ranges

    def adopt(self, settings: QuantizationConfig, kinds: dict[str, Kind], force: frozenset[str]) -> None:
        """Begin as a quantized module.

        Args:
            settings: of the model.
            kinds: quantizers to make.
            force: what is computed in floating point.
        """
        self.settings, self.mode, self.force = settings, "integer", force
        device = next(self.parameters()).device
        self.ranges = Ranges({name: Quantizer(kind, settings, device) for name, kind in kinds.items()})
        self.train(self.training)

    def floating(self, x: Tensor) -> Tensor:
        """The stream in the number format of the parameters, which mixed precision may have changed."""
        return x.to(next(self.parameters()).dtype)

    def quantizer(self, name: str) -> Quantizer:
        """The quantizer of that name."""
        return self.ranges[name]

    def read(self, x: Tensor, name: str, real: Tensor | None = None) -> Tensor:
        """Real values of the stream to integers of a quantizer; ``real`` as for :meth:`Quantizer.watch`."""
        quantizer = self.quantizer(name)
        q = quantized(checked(x), quantizer.target(real))
        quantizer.used(q)
        return q

    def normalize(self, norm: LayerNorm, x: Tensor, source: str, result: str, real: Tensor | None = None) -> Tensor:
        """Layer norm of the stream, from the integers of one quantizer to those of another.

        ``real`` is as for :meth:`Quantizer.watch`.
        """
        before, after = self.quantizer(source), self.quantizer(result)
        if "layernorm" in self.force:
            normalized = F.layer_norm(checked(x), norm.weight.shape, norm.weight.float(), norm.bias.float(), norm.eps)
            return self.read(normalized, result, real)
        q = normalized_stream(checked(x), norm.weight, norm.bias, norm.eps, before.target(), after.target(real))
        after.used(q)
        return q

    def multiply(
        self, x: Tensor, weight: Tensor, source: str, *, divided: TensorParallel | None = None
    ) -> tuple[Tensor, Tensor]:
        """A linear layer's accumulators.

        Args:
            x: ``[T, K]`` integers of a quantizer.
            weight: float parameter ``[N, K]``, of which this rank may hold a part.
            source: the quantizer.
            divided: the handle, where the ranks share the summed dimension; their accumulators are then summed.

        Returns:
            ``[T, N]`` (under sequence parallelism ``[T/t, N]`` where they were summed), and its float64 scale ``[N]``.
        """
        quantizer = self.quantizer(source)
        integers = quantize_weight(local_tensor(weight).detach(), self.settings.weight_bits, divided)
        scale = quantizer.scale()
        sums = integer_product(x, weight, integers, input_scale=scale, largest_input=quantizer.largest_integer())
        if divided is not None:
            sums = sum_over_ranks(sums, divided)
        return sums, integers.scale.double() * scale

    def observe(self, name: str, x: Tensor, real: Tensor | None = None) -> Tensor:
        """Show a quantizer the real values it stands for, and return them.

        Args:
            name: of the quantizer.
            x: ``[T, ..]``.
            real: bool ``[T]``, tokens that are not padding; None when all are.
        """
        self.quantizer(name).observe(x, real)
        return x


def checked(stream: Tensor) -> Tensor:
    """The stream, which only float32 holds exactly.

    Raises:
        UserError: it is something else.
    """
    if stream.dtype != torch.float32:
        raise UserError(
            f"a quantized module got hidden states in {stream.dtype}: the residual stream is float32, so let mixed "
            "precision not cast the inputs of modules"
        )
    return stream


class QuantizedLayerNorm(Quantized, LayerNorm):
    """The encoder's final norm: from the stream to the stream."""

    def quantize(self, settings: QuantizationConfig) -> None:
        """Begin as a quantized module."""
        self.adopt(settings, {"input": "stream", "output": "stream"}, settings.dequantized())

    def forward(self, x: Tensor) -> Tensor:
        """``[T, H]`` to the same, a multiple of the output's scale."""
        if self.mode == "float":
            return LayerNorm.forward(self, self.floating(x)).float()
        if self.mode == "observe":
            return self.observe("output", LayerNorm.forward(self, self.floating(self.observe("input", x))).float())
        self.quantizer("input").note(x)
        return self.normalize(self, x, "input", "output")
