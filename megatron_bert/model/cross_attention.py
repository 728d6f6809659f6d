# SPDX-License-Identifier: Apache-2.0
"""Attention of a decoder to the hidden states of an encoder, with heads divided over tensor-parallel ranks."""

from __future__ import annotations

from torch import Tensor

from megatron_bert.model.attention import AttentionHeads
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.requests import AttentionOutput, AttentionRequest
from megatron_bert.model.sequences import SequenceLayout
from parallel.layers import ColumnParallelLinear, RowParallelLinear
from parallel.mesh import SINGLE, TensorParallel


class CrossAttention(AttentionHeads):
    """Queries of the decoder's tokens, keys and values of the encoder's, whose number may be another.

    Rows of the key and value matrix are ordered ``[heads, 2, head_dim]``, so that a rank's heads are a plain slice.

    Args:
        config: sizes of the decoder; the encoder's hidden size is the same.
        tp: the tensor-parallel handle.
    """

    def __init__(self, config: MegatronBertConfig, *, tp: TensorParallel = SINGLE) -> None:
        super().__init__(config, tp=tp)
        hidden, std = config.hidden_size, config.initializer_range
        self.query = ColumnParallelLinear(hidden, hidden, init_std=std, tp=tp)
        self.key_value = ColumnParallelLinear(hidden, 2 * hidden, init_std=std, tp=tp)
        self.output = RowParallelLinear(hidden, hidden, init_std=config.output_init_std, tp=tp)

    def forward(
        self, hidden: Tensor, layout: SequenceLayout, dropout_keys: Tensor | None, request: AttentionRequest
    ) -> AttentionOutput:
        """Attend to the encoder's states.

        Args:
            hidden: ``[T, H]`` of the decoder.
            layout: its sequences, a rectangle.
            dropout_keys: int64 ``[T]`` dropout keys; None without dropout.
            request: with what to attend to, and perhaps a memory of its keys and values.

        Returns:
            ``[T, H]``, with what was asked for.
        """
        encoder = request.encoder
        assert encoder is not None, "cross-attention needs something to attend to"
        query = layout.to_rectangle(self.query(hidden).unflatten(-1, (self.heads, self.head_dim))).transpose(1, 2)

        def project() -> tuple[Tensor, Tensor]:
            assert encoder.hidden is not None
            both = self.key_value(encoder.hidden).unflatten(-1, (self.heads, 2, self.head_dim))
            key, value = both.unflatten(0, (layout.batch, encoder.length)).unbind(3)
            return key.transpose(1, 2), value.transpose(1, 2)

        key, value = project() if request.memory is None else request.memory.of_encoder(project)
        context, probabilities = self.attend(
            query,
            key,
            value,
            encoder.mask,
            None if dropout_keys is None else layout.to_rectangle(dropout_keys),
            first=request.first,
            head_mask=request.head_mask,
            explicit=request.probabilities or encoder.unattended,
        )
        return AttentionOutput(
            self.output(layout.from_rectangle(context.transpose(1, 2)).flatten(-2)),
            self.all_heads(probabilities, request.probabilities),
        )
