# SPDX-License-Identifier: Apache-2.0
"""Large tensors of processors in huge pages, whose addresses are translated 512 times as seldom."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from parallel.recording import values_unknown

#: Bytes of a huge page, and of the least that is worth several.
_PAGE, _LEAST = 1 << 21, 1 << 23


def large_zeros(size: int, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros ``[size]`` that stay for long: on a processor in huge pages, where the system has them."""
    bytes_needed = size * dtype.itemsize
    if device.type != "cpu" or bytes_needed < _LEAST or values_unknown() or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, bytes_needed + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # the system was built without them, or there is no memory left, as torch says better
        return torch.zeros(size, dtype=dtype, device=device)
    first = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % _PAGE
    return torch.frombuffer(memory, dtype=dtype, count=size, offset=first)
