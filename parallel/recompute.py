# SPDX-License-Identifier: Apache-2.0
"""Activation recomputation: keep less in the forward pass, compute it again in the backward pass.

``full`` keeps a layer's input only and runs its forward pass again. ``selective`` keeps everything that is expensive to
compute or to communicate and repeats only what is cheap for its size: GELU, whose result is as large as the widest
matrix product's, and scores, softmax and dropout of attention that is written out (fused attention keeps none of them).
See Korthikanti et al., arXiv 2205.05198, section 5.

The backward pass repeats a region only up to the last tensor it needs. A region that ends in a matrix product does not
repeat that product (autograd keeps its operands, which come before it), and a layer that ends in a sum over ranks does
not repeat the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "selective", "full"]


def recomputed(
    function: Callable[..., Any],
    mode: Recompute,
    *args: Any,
    at: Literal["selective", "full"] = "full",
    draws: bool = True,
    **kwargs: Any,
) -> Any:
    """Call ``function``; when ``mode`` is ``at``, keep its arguments only and call it again in the backward pass.

    Args:
        function: a layer, or a cheap region of one.
        mode: the recomputation of the model.
        at: the mode this region is recomputed at.
        draws: whether it may draw from torch's generator, as the dropout of fused attention does and keyed dropout does
            not: the state of that is then set back, which no graph of a GPU can record.
    """
    if mode != at or not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs)
