# SPDX-License-Identifier: Apache-2.0
"""The transformer layer in integer arithmetic, for both places of the norms."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_bert.ibert.activations import INTEGER_ACTIVATIONS
from megatron_bert.ibert.attention import AttentionScales, integer_attention, only_hidden
from megatron_bert.ibert.bounds import LARGEST_ROW, MOST_PRODUCTS
from megatron_bert.ibert.epilogues import activation_requantized, dequantized, quantized, requantized, rescale
from megatron_bert.ibert.fixed_point import GUARD_BITS, factor
from megatron_bert.ibert.modules import Quantized
from megatron_bert.ibert.quantizer import Kind
from megatron_bert.ibert.settings import QuantizationConfig
from megatron_bert.ibert.stream import added_to_stream
from megatron_bert.model.activations import ACTIVATIONS
from megatron_bert.model.attention_functions import explicit_attention
from megatron_bert.model.layer import (
    ATTENTION_OUTPUT,
    ATTENTION_PROBABILITIES,
    MLP_OUTPUT,
    LayerNorm,
    TransformerLayer,
    own_tokens,
)
from megatron_bert.model.requests import AttentionRequest, LayerOutput
from megatron_bert.model.sequences import SequenceLayout
from parallel.collectives import all_gather_tokens, copy_to_ranks, gather_from_ranks
from parallel.dropout import fold_in, keep_mask
from parallel.errors import UserError
from parallel.layers import RowParallelLinear
from parallel.mesh import TensorParallel
from parallel.recompute import recomputed
from parallel.sharding import local_tensor

_MATRIX_INPUTS: dict[str, Kind] = {
    "attention_input": "signed",
    "query": "attention",
    "key": "attention",
    "value": "attention",
    "context": "signed",
    "mlp_input": "signed",
    "gelu": "gelu",
}
#: Points of the residual stream: with pre-layer-norm what the norms read, with post-layer-norm what they give too.
_PRE_STREAM: dict[str, Kind] = {"input": "stream", "middle": "stream", "output": "stream"}
_POST_STREAM: dict[str, Kind] = {
    "attention_sum": "stream",
    "middle": "stream",
    "mlp_sum": "stream",
    "output": "stream",
}


def check_layer(layer: TransformerLayer, settings: QuantizationConfig) -> None:
    """Refuse what the specification does not cover.

    Raises:
        UserError: an activation without an integer function, cross-attention, relative positions, or a layer too wide
            for exact sums.
    """
    width, products = layer.attention_norm.weight.shape[0], layer.mlp.output.in_features
    if width * 2 ** (settings.residual_bits - 1) > LARGEST_ROW:
        raise UserError(
            f"a residual stream of {settings.residual_bits} bits and {width} columns overflows layer norm's sums: set "
            f"residual_bits to {(LARGEST_ROW // width).bit_length()} or less"
        )
    if products > MOST_PRODUCTS:
        raise UserError(f"the intermediate size is {products}, but accumulators hold {MOST_PRODUCTS} products at most")
    if layer.mlp.hidden_act not in INTEGER_ACTIVATIONS:
        raise UserError(
            f"the model has hidden_act {layer.mlp.hidden_act}, which integer arithmetic does not cover: quantize a "
            f"model with {', '.join(INTEGER_ACTIVATIONS)}"
        )
    if layer.cross_attention is not None:
        raise UserError("the model has cross-attention, which integer arithmetic does not cover: quantize an encoder")
    if layer.attention.distance is not None:
        raise UserError(
            "the model has relative position embeddings, which integer arithmetic does not cover: quantize a model "
            "with position_embedding_type absolute"
        )


class _Real(NamedTuple):
    """Where tokens are neither padding nor filling, for ranges; None where all are.

    Attributes:
        everywhere: bool ``[T]``.
        own: of this rank's tokens, which under sequence parallelism are fewer.
        places: bool ``[B, S]``, of the rectangle of attention.
    """

    everywhere: Tensor | None = None
    own: Tensor | None = None
    places: Tensor | None = None


def _real(layout: SequenceLayout, tp: TensorParallel) -> _Real:
    everywhere = layout.real_tokens()
    return _Real(everywhere, None if everywhere is None else own_tokens(everywhere, tp), layout.real_places())


class QuantizedTransformerLayer(Quantized, TransformerLayer):
    """A transformer layer whose forward pass is the integer specification; its backward pass goes straight through.

    The parameters are those of the float layer. See ``specification.md``.
    """

    def quantize(self, settings: QuantizationConfig, number: int) -> None:
        """Begin as a quantized module."""
        kinds = _MATRIX_INPUTS | (_POST_STREAM if self.post_norm else _PRE_STREAM)
        self.adopt(settings, kinds, settings.dequantized(number))
        self.quantizer("gelu").least = INTEGER_ACTIVATIONS[self.mlp.hidden_act].least

    def compile_forward(self) -> None:
        """Not possible.

        Raises:
            UserError: always.
        """
        raise UserError("a quantized layer is not compiled: set training.compile to false")

    def selects(self, hidden: Tensor) -> bool:  # noqa: ARG002
        """Ranges are those of all tokens."""
        return False

    # ---------------------------------------------------------------- which way

    def _forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        dropout_keys: Tensor | None,
        request: AttentionRequest | None = None,
        rows: Tensor | None = None,
    ) -> Tensor | LayerOutput:
        assert rows is None, "all tokens are computed"
        if self.mode == "float":
            answer = super()._forward(self.floating(hidden), layout, dropout_keys, request)
            return answer._replace(hidden=answer.hidden.float()) if isinstance(answer, LayerOutput) else answer.float()
        asked = AttentionRequest(mask=layout.rectangle_mask()) if request is None else request
        if asked.head_mask is not None:
            raise UserError("head_mask is given, but integer attention has no masks of heads: prune the heads instead")
        if asked.mask is not None and asked.mask.is_floating_point():
            allowed = only_hidden(asked.mask)
            if allowed is None:
                raise UserError(
                    "attention_mask holds values other than 0 and large negative numbers, which integer attention does "
                    "not add to its scores: say of every pair whether it may be attended to"
                )
            asked = replace(asked, mask=allowed)
        output = (self._observed if self.mode == "observe" else self._integer)(hidden, layout, dropout_keys, asked)
        return output.hidden if request is None else output

    # ---------------------------------------------------------------- in integers

    def _integer(
        self, hidden: Tensor, layout: SequenceLayout, dropout_keys: Tensor | None, request: AttentionRequest
    ) -> LayerOutput:
        attention = self.attention
        real = _real(layout, self.tp) if self.training else _Real()
        read = self._integer_read(self.attention_norm, hidden, "input", "attention_input", real.own)
        qkv = self._query_key_value(self._entered(read), real.everywhere)
        query, key, value = (part.transpose(1, 2) for part in layout.to_rectangle(qkv).unbind(3))
        if request.memory is not None:
            key, value = request.memory.grown(key, value)
        token_keys = (
            None if dropout_keys is None else layout.to_rectangle(fold_in(dropout_keys, ATTENTION_PROBABILITIES))
        )
        context, probabilities = recomputed(
            self._attend, self.recompute, query, key, value, request, token_keys, real.places, at="selective"
        )
        rows = layout.from_rectangle(context.transpose(1, 2))
        self.quantizer("context").used(rows)
        part = self.multiply(rows.flatten(-2), attention.output.weight, "context", divided=self.tp)
        where = ("attention_sum", "middle") if self.post_norm else ("middle", "middle")
        added = (attention.output, dropout_keys, ATTENTION_OUTPUT, where, real.own)
        hidden = self._integer_add(self.attention_norm, hidden, part, *added)
        read = self._integer_read(self.mlp_norm, hidden, "middle", "mlp_input", real.own)
        sums = self.multiply(self._entered(read), self.mlp.intermediate.weight, "mlp_input")
        part = recomputed(self._activated, self.recompute, *sums, real.everywhere, at="selective")
        where = ("mlp_sum", "output") if self.post_norm else ("output", "output")
        hidden = self._integer_add(
            self.mlp_norm, hidden, part, self.mlp.output, dropout_keys, MLP_OUTPUT, where, real.own
        )
        return LayerOutput(hidden, probabilities, None)

    def _integer_read(self, norm: LayerNorm, hidden: Tensor, source: str, result: str, real: Tensor | None) -> Tensor:
        """What a part of the layer reads of the stream, as the integers its first matrix product takes."""
        if self.post_norm:
            return self.read(hidden, result, real)
        if source == "input":
            self.quantizer(source).note(hidden, real)
        return self.normalize(norm, hidden, source, result, real)

    def _entered(self, read: Tensor) -> Tensor:
        """All tokens, for matrices whose rows are divided over the tensor ranks."""
        return all_gather_tokens(read, self.tp) if self.tp.sequence else copy_to_ranks(read, self.tp)

    def _query_key_value(self, x: Tensor, real: Tensor | None) -> Tensor:
        """Integers ``[T, A, 3, D]``, each of the three of its own scale."""
        heads, dim = self.attention.heads, self.attention.head_dim
        linear = self.attention.query_key_value
        sums, scale = self.multiply(x, linear.weight, "attention_input")
        quantizers = [self.quantizer(name) for name in ("query", "key", "value")]
        targets = [quantizer.target(real) for quantizer in quantizers]
        scales = torch.tensor([target.scale for target in targets], dtype=torch.float64, device=x.device)
        bias = None if linear.bias is None else local_tensor(linear.bias)
        number = factor(scale / scales[None, :, None].expand(heads, 3, dim).flatten(), GUARD_BITS)

        def watch(rounded: Tensor, rows: slice) -> None:
            for target, part in zip(targets, rounded.unflatten(-1, (heads, 3, dim)).unbind(2), strict=True):
                if target.watch is not None:
                    target.watch(part, rows)

        prepared = rescale(number, None if bias is None else bias.detach(), scale)
        watched = any(target.watch is not None for target in targets)
        together = targets[0]._replace(watch=watch if watched else None)
        qkv = requantized(sums, bias, prepared, together).unflatten(-1, (heads, 3, dim))
        for quantizer, part in zip(quantizers, qkv.unbind(2), strict=True):
            quantizer.used(part)
        return qkv

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        request: AttentionRequest,
        dropout_keys: Tensor | None,
        real: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Context ``[B, A, Q, D]`` in integers, and on request the probabilities ``[B, heads, Q, K]``."""
        attention, context = self.attention, self.quantizer("context")
        mask = attention.of_own_heads(request.mask)
        dropout = attention.dropout_prob if dropout_keys is not None else 0.0
        head_keys = None
        if dropout > 0.0:
            assert dropout_keys is not None
            head_keys = fold_in(dropout_keys[:, None, :], attention.own_numbers(query.device)[None, :, None])
        scales = AttentionScales(*(self.quantizer(name).scale() for name in ("query", "key", "value")))
        if "softmax" in self.force:
            parts = zip((query, key, value), scales, strict=True)
            wide = [dequantized(part, query.new_tensor(scale, dtype=torch.float64)) for part, scale in parts]
            mixed = explicit_attention(wide[0], wide[1], wide[2], mask, dropout, head_keys)
            return quantized(mixed.contiguous(), context.target(None if real is None else real[:, None])), None
        kept = None if head_keys is None else keep_mask(head_keys, key.shape[2], dropout)
        # Sequences times heads, as integer attention has them.
        of_heads = None if real is None else real.repeat_interleave(query.shape[1], dim=0)
        result, numerators, sums = integer_attention(
            query,
            key,
            value,
            mask,
            scales,
            context.target(of_heads),
            kept=kept,
            keep_factor=1.0 / (1.0 - dropout),
        )
        if not request.probabilities:
            return result, None
        return result, gather_from_ranks(numerators / sums.clamp(min=1.0), self.tp, dim=1)

    def _activated(self, sums: Tensor, scale: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """GELU of the wide accumulators, and the product with the second matrix."""
        gelu, linear = self.quantizer("gelu"), self.mlp.intermediate
        bias = None if linear.bias is None else local_tensor(linear.bias)
        target, act = gelu.target(real), self.mlp.hidden_act
        if "gelu" in self.force:
            q = quantized(ACTIVATIONS[act](dequantized(sums, scale, bias)), target)
        else:
            q = activation_requantized(sums, bias, scale, target, INTEGER_ACTIVATIONS[act])
        gelu.used(q)
        return self.multiply(q, self.mlp.output.weight, "gelu", divided=self.tp)

    def _integer_add(
        self,
        norm: LayerNorm,
        hidden: Tensor,
        part: tuple[Tensor, Tensor],
        linear: RowParallelLinear,
        dropout_keys: Tensor | None,
        place: int,
        where: tuple[str, str],
        real: Tensor | None,
    ) -> Tensor:
        """The stream with what a part of the layer gives: its accumulators and their scale."""
        sums, scale = part
        total, after = where
        target = self.quantizer(total).target(real)
        kept, keep_factor = None, 1.0
        if dropout_keys is not None and (dropout := self.dropout_at(place)) > 0.0:
            row_keys = fold_in(own_tokens(dropout_keys, self.tp), place)
            kept, keep_factor = keep_mask(row_keys, hidden.shape[-1], dropout), 1.0 / (1.0 - dropout)
        bias = linear.bias
        number = factor(scale * (keep_factor / target.unit))
        prepared = rescale(number, None if bias is None else bias.detach(), scale)
        hidden = added_to_stream(hidden, sums, bias, prepared, target, kept=kept, keep_factor=keep_factor)
        self.quantizer(total).used(hidden)
        return self.normalize(norm, hidden, total, after, real) if self.post_norm else hidden

    # ---------------------------------------------------------------- in floating point, observed

    def _observed(
        self, hidden: Tensor, layout: SequenceLayout, dropout_keys: Tensor | None, request: AttentionRequest
    ) -> LayerOutput:
        if dropout_keys is not None:
            raise UserError("ranges are observed with dropout switched on: put the model into evaluation mode first")
        if request.first:
            raise UserError("ranges are observed with cached keys and values: give whole sequences to calibrate on")
        hidden = self.floating(hidden)
        everywhere = layout.real_tokens()
        real = None if everywhere is None else own_tokens(everywhere, self.tp)
        if not self.post_norm:
            self.observe("input", hidden, real)
        read = self.observe("attention_input", self._read(self.attention_norm, hidden), real)
        attention = self.attention
        qkv = attention.query_key_value(read).unflatten(-1, (attention.heads, 3, attention.head_dim))
        for name, one in zip(("query", "key", "value"), qkv.unbind(2), strict=True):
            self.observe(name, one, everywhere)
        query, key, value = (one.transpose(1, 2) for one in layout.to_rectangle(qkv).unbind(3))
        if request.memory is not None:
            key, value = request.memory.grown(key, value)
        context, probabilities = attention.attend(
            query, key, value, request.mask, None, explicit=request.probabilities or request.unattended
        )
        rows = layout.from_rectangle(context.transpose(1, 2))
        part = attention.output(self.observe("context", rows, everywhere).flatten(-2))
        where = ("attention_sum", "middle") if self.post_norm else ("middle", "middle")
        hidden = self._observed_add(self.attention_norm, hidden, part, real, where)
        read = self.observe("mlp_input", self._read(self.mlp_norm, hidden), real)
        wide = ACTIVATIONS[self.mlp.hidden_act](self.mlp.intermediate(read))
        part = self.mlp.output(self.observe("gelu", wide, everywhere))
        where = ("mlp_sum", "output") if self.post_norm else ("output", "output")
        hidden = self._observed_add(self.mlp_norm, hidden, part, real, where)
        shown = attention.all_heads(probabilities, request.probabilities)
        return LayerOutput(hidden.float(), shown, None)

    def _observed_add(
        self, norm: LayerNorm, hidden: Tensor, part: Tensor, real: Tensor | None, where: tuple[str, str]
    ) -> Tensor:
        for term in (hidden, part):  # which have the scale of their sum
            self.quantizer(where[0]).see(term, real)
        if self.post_norm:
            self.observe(where[0], hidden + part, real)
        return self.observe(where[1], self._add(norm, hidden, part), real)
