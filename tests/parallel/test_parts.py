# SPDX-License-Identifier: Apache-2.0
"""Parts of tensors: ranges of elements as blocks, which checkpoints and ranks of any layout understand."""

from __future__ import annotations

import itertools
import math
import random
from itertools import pairwise

import pytest
import torch

from parallel.parts import PLANE, Part, Region, flat_regions
from parallel.stored.distributed_files import tile

SHAPES = [(), (1,), (7,), (3, 4), (1, 6), (5, 1), (2, 3, 4), (2, 0, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_of_a_range_are_its_elements_in_order(shape):
    whole = torch.arange(math.prod(shape)).view(shape)
    for first, last in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        regions = list(flat_regions(shape, first, last))
        blocks = [whole[tuple(slice(a, a + n) for a, n in zip(*region, strict=True))] for region in regions]
        found = torch.cat([whole.reshape(-1)[:0], *(block.reshape(-1) for block in blocks)])
        assert found.tolist() == list(range(first, last))
        assert all(block.numel() for block in blocks)
        assert len(regions) <= max(1, 2 * len(shape) - 1)


def test_a_matrix_has_at_most_three():
    assert list(flat_regions((4, 5), 3, 17)) == [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]
    assert list(flat_regions((4, 5), 6, 9)) == [((1, 1), (1, 3))]
    assert list(flat_regions((4, 5), 5, 15)) == [((1, 0), (2, 5))]


def test_blocks_share_memory_with_the_values():
    part = Part((4, 5), torch.zeros(14), tuple(flat_regions((4, 5), 3, 17)))
    for number, (region, values) in enumerate(part.blocks()):
        assert tuple(values.shape) == region[1]
        values.fill_(number + 1)
    assert part.values.tolist() == [1.0] * 2 + [2.0] * 10 + [3.0] * 2
    assert part.block((3, 0)).tolist() == [[3.0, 3.0]]
    other = part.empty_like()
    assert (other.shape, other.regions, other.axes) == (part.shape, part.regions, part.axes)
    assert other.values.data_ptr() != part.values.data_ptr()


def test_a_plain_tensor_is_a_part_of_itself():
    tensor = torch.randn(3, 4).t()
    part = Part.of(tensor)
    assert Part.of(part) is part
    assert (part.shape, part.axes) == ((4, 3), PLANE)
    ((region, values),) = part.blocks()
    assert region == ((0, 0), (4, 3))
    assert values.data_ptr() == tensor.data_ptr()
    assert values.equal(tensor)


def test_a_number_has_one_block():
    ((region, values),) = Part.of(torch.tensor(2.5)).blocks()
    assert region == ((), ())
    assert values.item() == 2.5


@pytest.mark.parametrize("shape", [(7,), (4, 6), (2, 3, 4)], ids=str)
def test_ranges_of_all_ranks_tile_a_tensor_and_other_blocks_do_not(shape):
    """Two tensor ranks, each of which divides its half of the last dimension over three data ranks."""
    rng = random.Random(4)
    halves = (shape[-1] // 2, shape[-1] - shape[-1] // 2)
    for _ in range(20):
        blocks: list[Region] = []
        for start, width in zip((0, halves[0]), halves):
            local = (*shape[:-1], width)
            total = math.prod(local)
            cuts = sorted(rng.randrange(total + 1) for _ in range(2))
            for first, last in pairwise([0, *cuts, total]):
                blocks += [
                    ((*offsets[:-1], offsets[-1] + start), sizes) for offsets, sizes in flat_regions(local, first, last)
                ]
        rng.shuffle(blocks)
        assert tile(blocks, shape)
        assert not tile(blocks[1:], shape)
        assert not tile([*blocks, blocks[0]], shape)
        offsets, sizes = blocks[0]
        moved = (*offsets[:-1], (offsets[-1] + 1) % shape[-1])
        assert not tile([(moved, sizes), *blocks[1:]], shape)
