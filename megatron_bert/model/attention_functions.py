# SPDX-License-Identifier: Apache-2.0
"""Attention as functions of query, key and value: written out, and by torch's fused kernels.

Shapes: B sequences, A heads, Q queries, K keys, D head dimension. Queries are ``[B, A, Q, D]``, keys and values
``[B, A, K, D]``. A mask is bool ``[B, K]``, or broadcasts to ``[B, A, Q, K]``; it is true where a key may be attended
to. One of floating point is added to the scores instead. Dropout drops probabilities of attention; its keys are int64
``[B, A, Q]``, one for each query of each head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.dropout import drop
from parallel.recording import is_recorded
from parallel.simulated_device import is_simulated_gpu, on_gpu


def attention_probabilities(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    dropout_keys: Tensor | None = None,
    positions: Tensor | None = None,
    head_mask: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias), after dropout and the head mask.

    A query without any key attends evenly to all.

    Args:
        bias: added to the scaled scores, ``[B, A, Q, K]``.
        positions: int32 ``[B, K]``, what dropout calls the keys; by default 0 to K - 1.
        head_mask: what the probabilities are multiplied with at last, broadcastable to ``[B, A, Q, K]``.

    Returns:
        ``[B, A, Q, K]``.
    """
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    if bias is not None:
        scores = scores + bias
    if mask is not None and mask.is_floating_point():
        scores = scores + _added(mask, scores.dtype)
        if scores.dtype == torch.float16:  # whose lowest number and a score may be less than any number
            scores = scores.clamp(min=torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores.masked_fill(~_broadcastable(mask), torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    if dropout > 0.0:
        assert dropout_keys is not None, "keyed dropout needs keys"
        columns = probabilities.shape[-1] if positions is None else positions[:, None, None, :]
        probabilities = drop(probabilities, dropout_keys, columns, dropout)
    return probabilities if head_mask is None else probabilities * head_mask


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    dropout_keys: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, ``[B, A, Q, D]``, written out: the reference, and the path with keyed dropout."""
    return torch.matmul(attention_probabilities(query, key, mask, dropout=dropout, dropout_keys=dropout_keys), value)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """The same by torch's fused kernels, whose dropout draws from torch's own generator; every query has a key."""
    mask = None if mask is None else _broadcastable(mask)
    if mask is not None and mask.is_floating_point():
        mask = _added(mask, query.dtype)
    elif mask is not None and (is_recorded() or is_simulated_gpu()):
        # Whether some query has no key is not known there; what is added to its scores makes them all alike.
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(query.dtype).min
        )
    if is_simulated_gpu():  # torch would choose as for a CPU
        context: Tensor
        if mask is None and query.dtype != torch.float32:
            context = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout)[0]
        else:
            bias = None if mask is None else mask.expand(*query.shape[:3], key.shape[2])
            efficient = torch.ops.aten._scaled_dot_product_efficient_attention
            context = efficient(query, key, value, bias, True, dropout)[0]
        return context
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def gpu_has_flash_attention() -> bool:
    """Whether the GPU in use runs flash attention: Ampere and later. Of no tensor: a constant to the compiler."""
    return torch.cuda.get_device_capability() >= (8, 0) and torch.backends.cuda.is_flash_attention_available()


def has_packed_attention(tensor: Tensor) -> bool:
    """Whether :func:`packed_attention` takes query, key and value like this tensor, ``[.., D]``."""
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    fits = tensor.shape[-1] % 8 == 0 and tensor.shape[-1] <= 256
    return on_gpu(tensor) and half and fits and (is_simulated_gpu() or gpu_has_flash_attention())


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, dropout: float = 0.0
) -> Tensor:
    """Attention within packed sequences by flash attention, whose dropout draws from torch's own generator.

    The operator is what ``torch.nn.attention.varlen`` and nested tensors call; the former has no dropout.

    Args:
        query, key, value: ``[T, A, D]`` as :func:`has_packed_attention` says.
        boundaries: int32 ``[B + 1]``, where each sequence starts and the last one ends.
        longest: tokens of the longest sequence, or more.

    Returns:
        ``[T, A, D]``.
    """
    context: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, boundaries, boundaries, longest, longest, dropout, False, False
    )[0]
    return context


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores of a type, which stay finite: a query that may attend to nothing attends to all."""
    return mask.to(dtype).clamp(min=torch.finfo(dtype).min)


def _broadcastable(mask: Tensor) -> Tensor:
    return mask[:, None, None, :] if mask.dim() == 2 else mask
