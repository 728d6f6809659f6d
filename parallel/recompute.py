"""Activation recomputation: keep less in the forward pass, compute it again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]

_aten = torch.ops.aten
_c10d = torch.ops._c10d_functional

#: What selective recomputation keeps: results that are dear to compute or to communicate. Everything else in a layer
#: (norms, GELU, dropout, softmax and scores of explicit attention) is cheap for its size and computed again.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _c10d.all_reduce.default,
    _c10d.all_gather_into_tensor.default,
    _c10d.reduce_scatter_tensor.default,
    _c10d.wait_tensor.default,
}


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def recomputed(function: Callable[..., Any], mode: Recompute, *args: Any, **kwargs: Any) -> Any:
    """Call ``function`` keeping what ``mode`` says for its backward pass.

    Args:
        function: a layer.
        mode: ``none`` keeps everything; ``selective`` keeps the results of matrix products, fused attention and
            collectives; ``full`` keeps the inputs only and runs the layer's forward pass again (which stops before a
            closing collective: nothing in the backward pass needs its result).
        *args: arguments of ``function``.
        **kwargs: keyword arguments of ``function``.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return function(*args, **kwargs)
    # Keyed dropout needs no generator state; fused attention does: its dropout draws from torch's generator.
    extra: dict[str, Any] = {"context_fn": _selective_contexts} if mode == "selective" else {}
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=True, **extra, **kwargs)
