# SPDX-License-Identifier: Apache-2.0
"""Where parameters lie in flat buffers, and the parts of the buffers that are communicated at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor, nn

from parallel.parts import Region, Sizes, flat_regions


@dataclass(eq=False)
class Slot:
    """Where a parameter lies.

    Attributes:
        parameter: which the modules use: this tensor rank's part, a view of the weights.
        shape: of the whole parameter.
        offsets: of this tensor rank's part in it.
        divided: whether tensor ranks divide it.
        start: in the buffers.
        gradient: of it, before data ranks are summed.
    """

    parameter: nn.Parameter
    shape: Sizes
    offsets: Sizes
    divided: bool
    start: int
    gradient: Tensor = field(init=False)

    @property
    def stop(self) -> int:
        """One after its last element in the buffers."""
        return self.start + self.parameter.numel()

    def regions(self, first: int, last: int) -> tuple[Region, ...]:
        """Blocks of the whole parameter that elements of this tensor rank's part are."""
        local = flat_regions(tuple(self.parameter.shape), first, last)
        return tuple((tuple(map(sum, zip(self.offsets, offsets))), sizes) for offsets, sizes in local)


@dataclass(eq=False)
class Bucket:
    """A part of the buffers, communicated at once.

    Attributes:
        slots: in the order of their starts.
        start: in the buffers.
        size: with what fills it up.
        own: range in the buffers that this rank updates.
        master: float32 weights of that range.
        missing: gradients that the last backward pass of the step has yet to add.
        reducing: the sum over data ranks, once it has begun.
        gathering: of the updated weights, until it has been waited for.
    """

    slots: list[Slot]
    start: int
    size: int
    own: slice
    master: Tensor
    missing: int = 0
    reducing: dist.Work | None = None
    gathering: dist.Work | None = None

    def own_part(self, slot: Slot) -> tuple[int, int]:
        """What this rank updates of a parameter, in the buffers."""
        low = min(max(slot.start, self.own.start), slot.stop)
        return low, max(low, min(slot.stop, self.own.stop))
