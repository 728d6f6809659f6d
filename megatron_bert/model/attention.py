"""Bidirectional self-attention with heads divided over tensor-parallel ranks.

Shapes: T tokens, B sequences, S their length, A heads on this rank, D head dimension, H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.sequences import SequenceLayout
from parallel.dropout import fold_in, keep_mask
from parallel.layers import ColumnParallelLinear, RowParallelLinear
from parallel.mesh import SINGLE, TensorParallel
from parallel.sharding import divide


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, dropout: float = 0.0, keys: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v written out: the reference, and the path with keyed dropout.

    Args:
        query, key, value: ``[B, A, S, D]``.
        key_mask: bool ``[B, S]``, true where a key may be attended to; a row with no such key attends evenly.
        dropout: probability of dropping an attention probability.
        keys: int64 ``[B, A, S]`` dropout keys, one for each query of each head.

    Returns:
        ``[B, A, S, D]``.
    """
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    if dropout > 0.0:
        assert keys is not None, "keyed dropout needs keys"
        kept = keep_mask(keys, probabilities.shape[-1], dropout)
        probabilities = torch.where(kept, probabilities * (1.0 / (1.0 - dropout)), 0.0)
    return torch.matmul(probabilities, value)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """The same by torch's fused kernels, whose dropout draws from torch's own generator.

    Args:
        query, key, value: ``[B, A, S, D]``.
        key_mask: bool ``[B, S]``, true where a key may be attended to; every sequence has at least one.
        dropout: probability of dropping an attention probability.
    """
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def _varlen_attention(qkv: Tensor, layout: SequenceLayout) -> Tensor:
    """Flash attention over packed sequences; ``[T, A, 3, D]`` to ``[T, A, D]``."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = qkv.unbind(2)
    bounds = layout.boundaries
    assert bounds is not None, "a packed layout has boundaries"
    context = varlen_attn(query, key, value, bounds, bounds, layout.length, layout.length)
    assert isinstance(context, Tensor)
    return context


class SelfAttention(nn.Module):
    """Query, key and value projections in one column-parallel matrix, attention, and a row-parallel output.

    Rows of the fused matrix are ordered ``[heads, 3, head_dim]``, so that a rank's heads are a plain slice.

    Args:
        config: sizes of the encoder.
        tp: the tensor-parallel handle.
        device: of the parameters.

    Raises:
        UserError: the tensor size does not divide the number of heads.
    """

    def __init__(
        self, config: MegatronBertConfig, *, tp: TensorParallel = SINGLE, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.heads = divide(config.num_attention_heads, tp, "model.num_attention_heads")
        self.first_head = tp.rank * self.heads
        self.head_dim = config.head_dim
        self.dropout = config.attention_probs_dropout_prob
        hidden = config.hidden_size
        self.query_key_value = ColumnParallelLinear(
            hidden, 3 * hidden, init_std=config.initializer_range, tp=tp, device=device
        )
        self.output = RowParallelLinear(hidden, hidden, init_std=config.output_init_std, tp=tp, device=device)

    def forward(self, hidden: Tensor, layout: SequenceLayout, keys: Tensor | None) -> Tensor:
        """Attend within sequences.

        Args:
            hidden: ``[T, H]``, or this rank's ``[T/t, H]`` under sequence parallelism.
            layout: which tokens belong together.
            keys: int64 ``[T]`` dropout keys of all tokens; None without dropout.

        Returns:
            As ``hidden``.
        """
        qkv = self.query_key_value(hidden).unflatten(-1, (self.heads, 3, self.head_dim))
        dropout = self.dropout if keys is not None else 0.0
        if layout.is_packed and dropout == 0.0 and qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16):
            context = _varlen_attention(qkv, layout)
        else:
            context = self._rectangular(qkv, layout, keys, dropout)
        return self.output(context.flatten(-2))

    def _rectangular(self, qkv: Tensor, layout: SequenceLayout, keys: Tensor | None, dropout: float) -> Tensor:
        query, key, value = (part.transpose(1, 2) for part in layout.to_rectangle(qkv).unbind(3))
        mask = layout.rectangle_mask()
        if dropout > 0.0 and keys is not None and not qkv.is_cuda:
            heads = torch.arange(self.first_head, self.first_head + self.heads, device=qkv.device)
            head_keys = fold_in(layout.to_rectangle(keys)[:, None, :], heads[None, :, None])
            context = explicit_attention(query, key, value, mask, dropout, head_keys)
        else:
            context = fused_attention(query, key, value, mask, dropout)
        return layout.from_rectangle(context.transpose(1, 2))
