# SPDX-License-Identifier: Apache-2.0
"""Embeddings in integers: words of 8 bits with a scale per row, positions and types of 16, and their sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_bert.ibert.epilogues import Target, clamp_into, empty_mask, quantized, rescale
from megatron_bert.ibert.fixed_point import Factor, factor
from megatron_bert.ibert.modules import Quantized
from megatron_bert.ibert.products import quantize_weight
from megatron_bert.ibert.quantizer import Kind
from megatron_bert.ibert.settings import QuantizationConfig
from megatron_bert.model.encoder import BertEmbeddings
from megatron_bert.model.layer import own_tokens
from parallel.dropout import keyed_dropout

#: Bits of the word table, which with a masked-language head is its last matrix too.
WORD_BITS = 8


def row_factor(scale: Tensor, unit: float) -> Factor:
    """What takes the integers of words to the stream's: a factor per row.

    Args:
        scale: float32 ``[N]``, of the rows.
        unit: a step of the stream.
    """
    return factor(scale.double() / unit)


class _Words(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, target: Target) -> Tensor:
        integers = quantize_weight(rows, WORD_BITS)
        prepared = rescale(row_factor(integers.scale[:, None], target.unit), None, integers.scale)
        out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        inside = empty_mask(ctx, rows)
        clamp_into(out, inside, slice(None), prepared(integers.q), target)
        ctx.save_for_backward(inside)
        ctx.dtype = rows.dtype
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient * ctx.saved_tensors[0]).to(ctx.dtype), None


class QuantizedEmbeddings(Quantized, BertEmbeddings):
    """Rows of the tables rounded to the stream's scale, their sum, and with post-layer-norm its norm.

    Rows are rounded when they are looked up, which gives the integers of a rounded table. Words are most of a file, and
    with a scale per row their 8 bits cost little; the other tables are small, and have the stream's 16.
    """

    def quantize(self, settings: QuantizationConfig) -> None:
        """Begin as a quantized module."""
        kinds: dict[str, Kind] = {"output": "stream"}
        if self.norm is not None:
            kinds["sum"] = "stream"
        self.adopt(settings, kinds, settings.dequantized())

    def forward(
        self,
        tokens: Tensor | None,
        positions: Tensor,
        types: Tensor,
        dropout_keys: Tensor | None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """Arguments and result as of BertEmbeddings; the result is a multiple of the output's scale."""
        if self.mode == "float":
            return super().forward(tokens, positions, types, dropout_keys, embedded).float()
        parts = [self._words(tokens) if embedded is None else embedded]
        if self.absolute:
            parts.append(self.position_embeddings(own_tokens(positions, self.tp)))
        parts.append(self.token_type_embeddings(own_tokens(types, self.tp)))
        summed = "output" if self.norm is None else "sum"
        if self.mode == "observe":
            for part in parts:  # which have the scale of their sum
                self.quantizer(summed).see(part)
            hidden = sum(parts[1:], parts[0])
            if self.norm is not None:
                hidden = self.norm(self.observe("sum", hidden))
            return self.observe("output", hidden).float()
        target = self.quantizer(summed).target()
        rounded = [_Words.apply(parts[0], target), *(quantized(part.float(), target) for part in parts[1:])]
        hidden = self.read(sum(rounded[1:], rounded[0]), summed)
        if self.norm is not None:
            hidden = self.normalize(self.norm, hidden, "sum", "output")
        if dropout_keys is None:
            return hidden
        return self.read(keyed_dropout(hidden, self.dropout_prob, own_tokens(dropout_keys, self.tp)), "output")
