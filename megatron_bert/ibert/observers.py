# SPDX-License-Identifier: Apache-2.0
"""What is remembered of the values that reach a quantizer, and the range it follows.

Each statistic can be summed (or its maximum taken) over batches, micro batches and ranks, so ranges are the same
however a batch is divided.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Histogram of magnitudes: bins a power of two, from 2^-20 to 2^12; what is below counts as the first bin.
_BINS_PER_OCTAVE, _LOWEST, _OCTAVES = 32, -20, 32
BINS = _BINS_PER_OCTAVE * _OCTAVES


def bin_edges() -> Tensor:
    """float64 ``[BINS]``, upper ends of the bins."""
    steps = torch.arange(1, BINS + 1, dtype=torch.float64) / _BINS_PER_OCTAVE
    return torch.exp2(steps + _LOWEST)


def histogram(magnitudes: Tensor) -> Tensor:
    """int64 ``[BINS]``, how many of the magnitudes (0 or more) fall into each bin."""
    place = magnitudes.flatten().float().log2().sub_(_LOWEST).mul_(_BINS_PER_OCTAVE)
    return torch.bincount(place.clamp_(0, BINS - 1).long(), minlength=BINS)


def percentile_range(counts: Tensor, percentile: float) -> float:
    """The least bin edge with at least ``percentile`` per cent of the magnitudes below."""
    below = counts.cumsum(0).double() / counts.sum().clamp(min=1) * 100
    place = int((below >= percentile).to(torch.uint8).argmax())
    return float(bin_edges()[place])


def least_error_range(counts: Tensor, steps: int) -> float:
    """The range r of least mean squared error: of clamping beyond r, and of rounding to multiples of r / steps within.

    Args:
        counts: int64 ``[BINS]``.
        steps: 127 for symmetric 8 bits.
    """
    used = counts.nonzero()
    if len(used) == 0:
        return 0.0
    last = int(used[-1])
    edges, weight = bin_edges(), counts.double()
    first = max(0, last - 6 * _BINS_PER_OCTAVE)
    candidates = edges[first : last + 1]
    excess = (edges[None, :] - candidates[:, None]).clamp_(min=0)
    clamping = (excess.square_() * weight).sum(1)
    inside = weight.cumsum(0)[first : last + 1]
    rounding = (candidates / steps).square() / 12 * inside
    return float(candidates[int((clamping + rounding).argmin())])
