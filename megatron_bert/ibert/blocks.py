# SPDX-License-Identifier: Apache-2.0
"""Element-wise work in blocks of rows that stay in a core's cache.

An integer epilogue is a dozen element-wise passes. Over a whole activation each would run at the speed of memory; over
a block of 2^15 elements (256 KiB in 64 bits) they run at that of the arithmetic, twice to four times as fast.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_ELEMENTS = 1 << 15
#: An accelerator has neither use for small blocks nor time to start them.
_ACCELERATOR_ELEMENTS = 1 << 26


def blocks(like: Tensor) -> Iterator[slice]:
    """Slices of the first dimension of a tensor."""
    budget = _ELEMENTS if like.device.type == "cpu" else _ACCELERATOR_ELEMENTS
    rows = like.shape[0]
    step = max(1, budget * rows // max(1, like.numel()))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
