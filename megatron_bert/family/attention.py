# SPDX-License-Identifier: Apache-2.0
"""Attention under the module names of transformers' classes, with what only these have.

That is relative positions, pruning, and attention of a decoder to an encoder.

Shapes: T tokens, B sequences, A heads on this rank, Q queries, K keys, D head dimension, H hidden size.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from megatron_bert.family.parts import Fused, Holder, divided_linear, dropout_prob, part
from megatron_bert.model.attention import AttentionHeads, SelfAttention
from megatron_bert.model.configuration import EncoderConfig
from megatron_bert.model.requests import AttentionRequest
from megatron_bert.model.resharding import selected
from megatron_bert.model.sequences import SequenceLayout
from parallel.collectives import copy_to_ranks
from parallel.layers import ColumnParallelLinear, RowParallelLinear
from parallel.mesh import TensorParallel
from parallel.sharding import local_size


class DistanceEmbedding(nn.Embedding):
    """A vector for each distance of two positions, whole on every tensor rank; all heads of a layer share it.

    It has the name of transformers 4. ``both`` says whether keys count too (``relative_key_query``).
    """

    def __init__(self, sizes: EncoderConfig, tp: TensorParallel) -> None:
        super().__init__(2 * sizes.max_position_embeddings - 1, sizes.head_dim, device="meta")
        self.to_empty(device=torch.get_default_device())
        self.tp, self.both = tp, sizes.position_embedding_type == "relative_key_query"

    def forward(self, query: Tensor, key: Tensor, first: int) -> Tensor:  # type: ignore[override]
        """What relative positions add to the scaled scores: q . r, and with ``both`` also k . r.

        r is the row for (position of the query) - (position of the key). Queries and keys are multiplied with all rows
        that occur and the products picked afterwards: Q + K rows instead of Q * K.

        Args:
            query: ``[B, A, Q, D]``, at positions ``first`` to ``first + Q - 1``.
            key: ``[B, A, K, D]``, at positions 0 to K - 1.
            first: position of the first query.

        Returns:
            ``[B, A, Q, K]``.
        """
        # Each rank uses the table for its own heads, so its gradient is summed over ranks.
        distances = copy_to_ranks(self.weight, self.tp)
        queries, keys = query.shape[2], key.shape[2]
        zero = (distances.shape[0] - 1) // 2
        rows = distances[zero + first - (keys - 1) : zero + first + queries].to(query.dtype).t()
        column = (
            torch.arange(queries, device=query.device)[:, None] - torch.arange(keys, device=query.device) + keys - 1
        )
        scores = torch.matmul(query, rows).gather(-1, column.expand(*query.shape[:3], keys))
        if self.both:
            by_key = torch.matmul(key, rows).gather(-1, column.t().expand(*key.shape[:3], queries))
            scores = scores + by_key.transpose(-1, -2)
        return scores * query.shape[-1] ** -0.5


class Projections(nn.Module):
    """Query, key and value of one attention module, and its table of distances."""

    def __init__(self, sizes: EncoderConfig, tp: TensorParallel) -> None:
        super().__init__()
        for name in ("query", "key", "value"):
            self.add_module(name, divided_linear(ColumnParallelLinear, sizes.hidden_size, sizes.hidden_size, tp))
        self.dropout = nn.Dropout(sizes.attention_probs_dropout_prob)
        if sizes.position_embedding_type != "absolute":
            self.distance_embedding = DistanceEmbedding(sizes, tp)


class _Attention(AttentionHeads):
    """The levels of names of an attention module; with post-layer-norm the norm stands in its output."""

    projections = part("self")
    norm = part("ln", "output.LayerNorm")
    distance = part("self.distance_embedding")

    def __init__(self, sizes: EncoderConfig, tp: TensorParallel) -> None:
        AttentionHeads.__init__(self, sizes, tp=tp)  # not SelfAttention's, which makes the parts under other names
        post = sizes.layer_norm_placement == "post"
        if not post:
            self.ln = nn.LayerNorm(sizes.hidden_size, sizes.layer_norm_eps)
        self.add_module("self", Projections(sizes, tp))
        norm = nn.LayerNorm(sizes.hidden_size, sizes.layer_norm_eps) if post else None
        self.output = Holder(
            divided_linear(RowParallelLinear, sizes.hidden_size, sizes.hidden_size, tp), norm, sizes.hidden_dropout_prob
        )

    @property
    def dropout_prob(self) -> float:  # type: ignore[override]
        """Of attention probabilities."""
        return dropout_prob(self.projections.dropout)

    def by_head(self, linear: Any, tokens: Tensor) -> Tensor:
        """A projection ``[T, A, D]`` of ``[T, H]``."""
        return linear(tokens).unflatten(-1, (self.heads, self.head_dim))


class Attention(_Attention, SelfAttention):
    """Self-attention."""

    @property
    def query_key_value(self) -> Fused:  # type: ignore[override]
        """The three projections as one, as integer layers read them."""
        own = self.projections
        return Fused([own.query, own.key, own.value], self.head_dim)

    def project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, ``[T, A, D]`` each: they are not put side by side first."""
        own = self.projections
        return tuple(self.by_head(linear, hidden) for linear in (own.query, own.key, own.value))

    def places_without(self, heads: Collection[int]) -> list[int]:
        """Places of the heads of all ranks that remain without some, which are given by their original numbers.

        Raises:
            UserError: the tensor size does not divide their number.
        """
        kept = [place for place, number in enumerate(self.numbers) if number not in heads]
        local_size(len(kept), self.tp, "the number of heads that remain in a layer")
        return kept

    def prune(self, heads: Collection[int]) -> None:
        """Remove heads, by their original numbers; those that are gone already do not matter.

        The parameters are replaced by smaller ones; under tensor parallelism the remaining heads are redistributed.

        Raises:
            UserError: the tensor size does not divide the rest.
        """
        kept = self.places_without(heads)
        count, own = len(kept) // self.tp.size, self.projections
        rows = (torch.tensor(kept)[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()
        for linear in (own.query, own.key, own.value):
            linear.weight = selected(linear.weight, rows, self.tp, dim=0)
            linear.bias = selected(linear.bias, rows, self.tp, dim=0)
            linear.out_features = len(rows)
        output = self.output.dense
        output.weight = selected(output.weight, rows, self.tp, dim=1)
        output.in_features = len(rows)
        self.numbers = [self.numbers[place] for place in kept]
        self.heads, self.first_head = count, self.tp.rank * count


class CrossAttention(_Attention):
    """Queries of the decoder's tokens, keys and values of the encoder's, whose number may be another."""

    def forward(
        self, hidden: Tensor, layout: SequenceLayout, dropout_keys: Tensor | None, request: AttentionRequest
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the encoder's states in the request, which may have a memory of their keys and values.

        Other arguments are those of Encoder, of the decoder; the result is as of :meth:`answer`.
        """
        encoder, own = request.encoder, self.projections
        assert encoder is not None, "cross-attention needs something to attend to"
        query = layout.to_rectangle(self.by_head(own.query, hidden)).transpose(1, 2)

        def project() -> tuple[Tensor, Tensor]:
            assert encoder.hidden is not None
            size = (layout.batch, encoder.length)
            key, value = (self.by_head(linear, encoder.hidden) for linear in (own.key, own.value))
            return key.unflatten(0, size).transpose(1, 2), value.unflatten(0, size).transpose(1, 2)

        key, value = project() if request.memory is None else request.memory.of_encoder(project)
        return self.answer(query, key, value, layout, dropout_keys, request, encoder)
