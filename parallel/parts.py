# SPDX-License-Identifier: Apache-2.0
"""What one rank holds of a tensor that is divided over ranks: by rows (DTensor), or a range of its elements."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.torch_types import is_dtensor

Sizes = tuple[int, ...]
#: Offsets in the whole tensor, and sizes.
Region = tuple[Sizes, Sizes]

#: Axes of a (tensor x data) plane of ranks.
PLANE = frozenset({"tensor", "data_replicate", "data_shard"})


def replicated_axes(tensor: Tensor) -> frozenset[str]:
    """The axes of a (tensor x data) plane over which a tensor is copied; the others divide it."""
    if not is_dtensor(tensor):
        return PLANE
    names = tensor.device_mesh.mesh_dim_names or ()  # a mesh without names is none of a run
    return PLANE - {name for name, place in zip(names, tensor.placements) if not place.is_replicate()}


def flat_regions(shape: Sizes, first: int, last: int) -> Iterator[Region]:
    """The blocks that make up elements ``first`` to ``last`` of a tensor in row-major order.

    Of a matrix these are at most three: the end of a row, whole rows, and the beginning of a row.

    Args:
        first: number of the first element.
        last: one after the number of the last element.
    """
    if first >= last:
        return
    if len(shape) < 2:
        yield ((first,), (last - first,)) if shape else ((), ())
        return
    inner = math.prod(shape[1:])
    row, skipped = divmod(first, inner)
    end, beyond = divmod(last, inner)
    if skipped or row == end:
        within = last - row * inner if row == end else inner
        yield from _in_row(shape, row, skipped, within)
        row += 1
    if row < end:
        yield (row, *(0 for _ in shape[1:])), (end - row, *shape[1:])
    if row <= end and beyond:
        yield from _in_row(shape, end, 0, beyond)


def _in_row(shape: Sizes, row: int, first: int, last: int) -> Iterator[Region]:
    for offsets, sizes in flat_regions(shape[1:], first, last):
        yield (row, *offsets), (1, *sizes)


@dataclass(frozen=True, eq=False)
class Part:
    """What this rank holds of a tensor.

    Attributes:
        shape: of the whole tensor.
        values: of this rank; flat where they are several blocks.
        regions: the blocks that the values are, one after the other.
        axes: of a (tensor x data) plane of ranks, over which the values are copied.
    """

    shape: Sizes
    values: Tensor
    regions: tuple[Region, ...]
    axes: frozenset[str] = PLANE

    @classmethod
    def of(cls, tensor: Tensor | Part) -> Part:
        """What this rank holds of a tensor (a DTensor where it is divided), sharing memory with it."""
        if isinstance(tensor, Part):
            return tensor
        shape = tuple(tensor.shape)
        if not is_dtensor(tensor):
            return cls(shape, tensor.detach(), (((0,) * len(shape), shape),))
        # Where the block of this process lies, by the method that torch.distributed.checkpoint asks as well.
        (chunk,) = tensor.__create_chunk_list__()
        region = tuple(chunk.offsets), tuple(chunk.sizes)
        return cls(shape, tensor.to_local().detach(), (region,), replicated_axes(tensor))

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self.values.dtype

    def blocks(self) -> Iterator[tuple[Region, Tensor]]:
        """Each block and its values, in its shape, sharing memory with the values."""
        if len(self.regions) == 1 and tuple(self.values.shape) == self.regions[0][1]:
            yield self.regions[0], self.values
            return
        start = 0
        for region in self.regions:
            count = math.prod(region[1])
            yield region, self.values[start : start + count].view(region[1])
            start += count

    def block(self, offsets: Sizes) -> Tensor:
        """The values of the block at these offsets."""
        return next(values for region, values in self.blocks() if region[0] == offsets)

    def empty_like(self) -> Part:
        """The same part of another tensor, whose values are not set."""
        return Part(self.shape, torch.empty_like(self.values), self.regions, self.axes)
