# SPDX-License-Identifier: Apache-2.0
"""Tensors without numbers, or that stand for those of a GPU, where a step is simulated on a machine without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from parallel.sharding import local_tensor

_gpu = False


@contextmanager
def standing_for_gpu(gpu: bool = True) -> Iterator[None]:
    """While the block lasts, tensors stand for those of a GPU with flash attention: what is chosen by device is so.

    Args:
        gpu: False changes nothing.
    """
    global _gpu
    before, _gpu = _gpu, gpu
    try:
        yield
    finally:
        _gpu = before


def is_simulated_gpu() -> bool:
    """Whether tensors stand for those of a GPU."""
    return _gpu


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is on a GPU, or stands for one that is."""
    return tensor.is_cuda or _gpu


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor has values, and not a shape alone."""
    local = local_tensor(tensor)
    return not (local.is_meta or isinstance(local.detach(), FakeTensor))
