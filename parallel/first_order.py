# SPDX-License-Identifier: Apache-2.0
"""Training steps on processors, where passes over memory cost as much as products.

A training step differentiates a loss once and forgets how it came about. Functions that know so may work in place: they
may overwrite what autograd would have kept for a second derivative, and add to gradients that are there already. They
do so inside of :func:`first_order` alone, and give what they give outside of it, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from parallel.recording import is_recorded
from parallel.simulated_device import has_numbers, on_gpu

_first_order = False


@contextmanager
def first_order() -> Iterator[None]:
    """While the block lasts, results are differentiated at most once, and that inside of it.

    The variable is the process's, not the thread's: autograd recomputes on threads of its own.
    """
    global _first_order
    before, _first_order = _first_order, True
    try:
        yield
    finally:
        _first_order = before


def in_place(tensor: Tensor) -> bool:
    """Whether what is made of a tensor may be computed in place: in float32 on a processor, in :func:`first_order`.

    Tensors without numbers are simulated as elsewhere.
    """
    return (
        not is_recorded()
        and _first_order
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and not on_gpu(tensor)
        and torch.is_grad_enabled()
        and has_numbers(tensor)
    )
