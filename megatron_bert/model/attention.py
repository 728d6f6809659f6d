# SPDX-License-Identifier: Apache-2.0
"""Self-attention with heads divided over tensor-parallel ranks.

Shapes: T tokens, B sequences, S their length, A heads on this rank, D head dimension, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_bert.model.attention_functions import (
    attention_probabilities,
    fused_attention,
    has_packed_attention,
    packed_attention,
)
from megatron_bert.model.attention_in_place import attention_in_place
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.requests import AttentionRequest, EncoderStates
from megatron_bert.model.sequences import SequenceLayout
from parallel.collectives import copy_to_ranks, gather_from_ranks
from parallel.dropout import fold_in
from parallel.first_order import in_place
from parallel.layers import ColumnParallelLinear, RowParallelLinear
from parallel.mesh import SINGLE, TensorParallel
from parallel.recompute import Recompute, recomputed
from parallel.recording import is_recorded
from parallel.sharding import local_size
from parallel.simulated_device import on_gpu

#: Scores of padding for each packed sequence up to which a processor attends within neighboring sequences at once.
#: More of them cost more than calls of their own for each sequence (measured on a Xeon with AVX-512).
SCORES_PER_SEQUENCE = 1 << 15
#: Keys up to which a processor trains faster in bfloat16 with attention written out: the backward pass of torch's fused
#: kernel takes 2 to 5 times as long up to 128 keys, and 1.5 times for 256 (torch 2.13, AMX). For more the gain is small
#: and the memory large.
WRITTEN_OUT_KEYS = 256


def in_parts(tokens: Tensor) -> bool:
    """Whether packed sequences are attended to run by run, each in a rectangle of its own."""
    return tokens.device.type == "cpu" and not on_gpu(tokens) and not is_recorded()


class AttentionHeads(nn.Module):
    """Heads of one attention module on this rank: what self-attention and cross-attention have in common.

    Raises:
        UserError: the tensor size does not divide the number of heads.
    """

    #: The table of distances, of classes with relative positions.
    distance: nn.Module | None = None
    #: Of attention probabilities.
    dropout_prob: float
    output: Any

    def __init__(
        self, config: MegatronBertConfig, *, tp: TensorParallel = SINGLE, recompute: Recompute = "none"
    ) -> None:
        super().__init__()
        self.tp, self.recompute = tp, recompute
        self.heads = local_size(config.num_attention_heads, tp, "$num_attention_heads")
        self.first_head = tp.rank * self.heads
        #: The heads of all ranks, by their numbers before any was removed.
        self.numbers = list(range(config.num_attention_heads))
        self.head_dim = config.head_dim

    def own_numbers(self, device: torch.device) -> Tensor:
        """int64 ``[A]``, numbers of this rank's heads."""
        end = self.first_head + self.heads
        if self.numbers[-1] == len(self.numbers) - 1:
            return torch.arange(self.first_head, end, device=device)
        return torch.tensor(self.numbers[self.first_head : end], device=device)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout_keys: Tensor | None,
        *,
        first: int = 0,
        positions: Tensor | None = None,
        head_mask: Tensor | None = None,
        explicit: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention by the fastest way that gives what is asked.

        Args:
            query: ``[B, A, Q, D]``.
            key, value: ``[B, A, K, D]``.
            mask: bool ``[B, K]`` or broadcastable to ``[B, all heads, Q, K]``, true where a key may be attended to; or
                what is added to the scores.
            dropout_keys: int64 ``[B, Q]`` dropout keys; None without dropout.
            first: position of the first query, counted from the first key.
            positions: int32 ``[B, K]``, what dropout calls the keys; by default 0 to K - 1.
            head_mask: of all heads, broadcastable to ``[B, all heads, Q, K]``.
            explicit: write the probabilities out.

        Returns:
            ``[B, A, Q, D]``, and the probabilities ``[B, A, Q, K]`` where they were written out.
        """
        dropout = self.dropout_prob if dropout_keys is not None else 0.0
        keyed = dropout > 0.0 and not on_gpu(query)
        mask = self.of_own_heads(mask)
        trained_on_cpu = (
            self.training and query.device.type == "cpu" and not on_gpu(query) and query.dtype == torch.bfloat16
        )
        faster = trained_on_cpu and key.shape[2] <= WRITTEN_OUT_KEYS
        if not (keyed or faster or explicit or head_mask is not None or self.distance is not None):
            return fused_attention(query, key, value, mask, dropout), None
        return recomputed(
            self._write_out,
            self.recompute,
            query,
            key,
            value,
            mask,
            dropout_keys,
            first,
            positions,
            head_mask,
            at="selective",
            draws=False,
        )

    def _write_out(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout_keys: Tensor | None,
        first: int,
        positions: Tensor | None,
        head_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        head_keys = None
        if self.dropout_prob > 0.0 and dropout_keys is not None:
            head_keys = self._head_keys(dropout_keys)
        probabilities = attention_probabilities(
            query,
            key,
            mask,
            bias=None if self.distance is None else self.distance(query, key, first),
            dropout=0.0 if head_keys is None else self.dropout_prob,
            dropout_keys=head_keys,
            positions=positions,
            head_mask=self.of_own_heads(head_mask),
        )
        return torch.matmul(probabilities, value), probabilities

    def _head_keys(self, dropout_keys: Tensor) -> Tensor:
        """Dropout keys of each head, int64 ``[B, A, Q]``."""
        return fold_in(dropout_keys[:, None, :], self.own_numbers(dropout_keys.device)[None, :, None])

    def of_own_heads(self, mask: Tensor | None) -> Tensor | None:
        """The part of this rank in ``[B, all heads or 1, Q, K]``; what has no heads stays."""
        if mask is None or mask.dim() < 4 or mask.shape[1] in (1, self.heads):
            return mask
        return copy_to_ranks(mask, self.tp).index_select(1, self.own_numbers(mask.device))

    def all_heads(self, probabilities: Tensor | None, wanted: bool) -> Tensor | None:
        """Probabilities of every rank's heads, ``[B, heads, Q, K]``."""
        if not wanted or probabilities is None:
            return None
        return gather_from_ranks(probabilities, self.tp, dim=1)

    def answer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: SequenceLayout,
        dropout_keys: Tensor | None,
        request: AttentionRequest,
        encoder: EncoderStates | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What is asked of sequences in a rectangle, whose keys may be those of an encoder.

        Returns:
            ``[T, H]``, and if asked for the probabilities ``[B, heads, Q, K]`` of all ranks' heads.
        """
        seen = request if encoder is None else encoder
        context, probabilities = self.attend(
            query,
            key,
            value,
            seen.mask,
            None if dropout_keys is None else layout.to_rectangle(dropout_keys),
            first=request.first,
            head_mask=request.head_mask,
            explicit=request.probabilities or seen.unattended,
        )
        hidden = self.output(layout.from_rectangle(context.transpose(1, 2)).flatten(-2))
        return hidden, self.all_heads(probabilities, request.probabilities)


class SelfAttention(AttentionHeads):
    """Query, key and value projections in one column-parallel matrix, attention, and a row-parallel output.

    Rows of the fused matrix are ordered ``[heads, 3, head_dim]``, so that a rank's heads are a plain slice.
    """

    def __init__(
        self, config: MegatronBertConfig, *, tp: TensorParallel = SINGLE, recompute: Recompute = "none"
    ) -> None:
        super().__init__(config, tp=tp, recompute=recompute)
        self.dropout_prob = config.attention_probs_dropout_prob
        hidden = config.hidden_size
        self.query_key_value = ColumnParallelLinear(hidden, 3 * hidden, init_std=config.initializer_range, tp=tp)
        self.output = RowParallelLinear(hidden, hidden, init_std=config.output_init_std, tp=tp)

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        dropout_keys: Tensor | None,
        request: AttentionRequest | None = None,
        rows: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Attend within sequences; on request, with its mask in place of the layout's, which is a rectangle.

        Arguments are those of Encoder; the result is as of ``hidden``, or of its ``rows``, and on request as of
        :meth:`answer`.
        """
        projected = self.project(hidden)
        if request is not None:
            query, key, value = _rectangles(projected, layout)
            if request.memory is not None:
                key, value = request.memory.grown(key, value)
            return self.answer(query, key, value, layout, dropout_keys, request)
        if layout.boundaries is not None and self.distance is None and has_packed_attention(projected[0]):
            dropout = self.dropout_prob if dropout_keys is not None else 0.0
            query, key, value = _apart(projected, 2)
            context = packed_attention(query, key, value, layout.boundaries, layout.length, dropout)
        elif layout.is_packed and in_parts(hidden):
            context = self._attend_in_parts(projected, layout.parts(SCORES_PER_SEQUENCE // self.heads), dropout_keys)
        else:
            context = self._attend_within(projected, layout, dropout_keys)
        context = context.flatten(-2)
        return self.output(context if rows is None else context.index_select(0, rows))

    def project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value: ``[T, A, 3, D]``, or ``[T, A, D]`` each where they come from matrices of their own."""
        return (self.query_key_value(hidden).unflatten(-1, (self.heads, 3, self.head_dim)),)

    def _attend_in_parts(
        self, projected: tuple[Tensor, ...], parts: list[SequenceLayout], dropout_keys: Tensor | None
    ) -> Tensor:
        if len(parts) == 1:
            return self._attend_within(projected, parts[0], dropout_keys)
        sizes = [sum(part.lengths) for part in parts]
        all_keys = [None] * len(parts) if dropout_keys is None else dropout_keys.split(sizes)
        each = zip(*(tokens.split(sizes) for tokens in projected), strict=True)
        return torch.cat(list(map(self._attend_within, each, parts, all_keys)))

    def _attend_within(
        self, projected: tuple[Tensor, ...], layout: SequenceLayout, dropout_keys: Tensor | None
    ) -> Tensor:
        """Projections of sequences in a rectangle, and dropout keys ``[T]``, to ``[T, A, D]``."""
        mask, positions = layout.rectangle_mask(), layout.row_positions
        rectangle_keys = None if dropout_keys is None else layout.to_rectangle(dropout_keys)
        if rectangle_keys is not None and self.dropout_prob > 0.0 and self.distance is None and in_place(projected[0]):
            one = projected[0] if len(projected) == 1 else torch.stack(projected, 2)
            args = layout.to_rectangle(one), mask, self.dropout_prob, self._head_keys(rectangle_keys), positions
            context = recomputed(attention_in_place, self.recompute, *args, at="selective", draws=False)
            return layout.from_rectangle(context)
        query, key, value = _rectangles(projected, layout)
        context, _ = self.attend(query, key, value, mask, rectangle_keys, positions=positions)
        return layout.from_rectangle(context.transpose(1, 2))


def _apart(projected: Sequence[Tensor], dim: int) -> Sequence[Tensor]:
    return projected if len(projected) == 3 else projected[0].unbind(dim)


def _rectangles(projected: tuple[Tensor, ...], layout: SequenceLayout) -> list[Tensor]:
    """Query, key and value, ``[B, A, S, D]`` each."""
    return [part.transpose(1, 2) for part in _apart([layout.to_rectangle(tokens) for tokens in projected], 3)]
