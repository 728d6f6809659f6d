# SPDX-License-Identifier: Apache-2.0
"""Optional fused kernels from NVIDIA's apex, PyTorch's own otherwise.

apex is never needed. The package of that name on the Python package index is another project; NVIDIA's is recognized
by its compiled extensions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.recording import is_recorded


def _import(module: str) -> Any | None:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


@cache
def apex_layer_norm() -> Callable[..., Tensor] | None:
    """The fused affine layer norm of NVIDIA's apex, if it is installed with its kernel."""
    if _import("fused_layer_norm_cuda") is None:
        return None
    module = _import("apex.normalization.fused_layer_norm")
    return getattr(module, "fused_layer_norm_affine", None)


@cache
def apex_adam() -> Callable[..., torch.optim.Optimizer] | None:
    """FusedAdam of NVIDIA's apex, if it is installed with its kernels."""
    if _import("amp_C") is None:
        return None
    return getattr(_import("apex.optimizers"), "FusedAdam", None)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalize the last dimension, by the fastest kernel at hand for the tensor's device.

    Compiled code takes torch's, which the compiler fuses with what stands around it.
    """
    fused = apex_layer_norm() if x.is_cuda and not is_recorded() else None
    if fused is not None:
        return fused(x, weight, bias, weight.shape, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def report(device: torch.device) -> dict[str, str]:
    """Which implementation a run on ``device`` uses for each replaceable part."""
    cuda = device.type == "cuda"
    return {
        "layer norm": "apex" if cuda and apex_layer_norm() is not None else "torch",
        "Adam": "apex" if cuda and apex_adam() is not None else "torch fused",
    }
