# SPDX-License-Identifier: Apache-2.0
"""Token axis to rectangle and back."""

from __future__ import annotations

import pytest
import torch

from megatron_bert.model.sequences import Bounds, SequenceLayout, filling


def test_rectangle():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    layout = SequenceLayout.rectangle(2, 3, mask)
    tokens = torch.arange(12).view(6, 2)
    assert layout.to_rectangle(tokens).equal(tokens.view(2, 3, 2))
    assert layout.from_rectangle(layout.to_rectangle(tokens)).equal(tokens)
    assert layout.rectangle_mask() is mask
    assert not layout.is_packed
    assert SequenceLayout.rectangle(2, 3).rectangle_mask() is None


@pytest.mark.parametrize("lengths", [[3], [2, 5, 1], [4, 4], [5, 5], [1, 1, 1, 1]])
@pytest.mark.parametrize("longest", [5, 7])
def test_packed(lengths, longest):
    layout = SequenceLayout.packed(torch.tensor(lengths), longest)
    total = sum(lengths)
    tokens = torch.arange(1, 2 * total + 1).view(total, 2)
    rectangle = layout.to_rectangle(tokens)
    assert rectangle.shape == (len(lengths), longest, 2)
    assert layout.from_rectangle(rectangle).equal(tokens)
    mask = layout.rectangle_mask()
    if total == len(lengths) * longest:
        assert mask is None
        mask = torch.ones(len(lengths), longest, dtype=torch.bool)
    assert mask.sum(dim=1).tolist() == lengths
    assert rectangle[~mask].eq(0).all()
    for row, part in zip(rectangle, tokens.split(lengths), strict=True):
        assert row[: len(part)].equal(part)
    assert layout.is_packed
    assert layout.boundaries.dtype == torch.int32
    assert layout.boundaries.diff().tolist() == lengths
    assert layout.lengths == lengths


@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
def test_few_sizes_at_little_cost(multiple):
    sizes = [tokens + filling(tokens, multiple) for tokens in range(1, 4097)]
    assert all(size % multiple == 0 for size in sizes)
    assert len(set(sizes[512:])) <= (4096 - 512) // 32
    for tokens, size in enumerate(sizes, start=1):
        assert 0 <= size - tokens < multiple * min(64, max(1, tokens / 16))
    assert filling(15) == filling(1) == 0


@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
def test_the_fewest_sizes_for_compiled_code(multiple):
    sizes = [tokens + filling(tokens, multiple, few=True) for tokens in range(1, 4097)]
    assert all(size % multiple == 0 for size in sizes)
    assert len(set(sizes[511:])) <= 3 * 8 + 1
    for tokens, size in enumerate(sizes, start=1):
        assert 0 <= size - tokens < multiple * max(1, tokens / 8)


@pytest.mark.parametrize("multiple", [1, 3, 8])
@pytest.mark.parametrize("lengths", [[7], [5, 1], [9, 9, 9], [9] * 16, [1] * 16])
def test_shapes_within_bounds_depend_on_tokens_alone(lengths, multiple):
    bounds = Bounds(sequences=16, longest=9, multiple=multiple)
    fill = filling(sum(lengths), multiple, few=True)
    layout = SequenceLayout.packed(torch.tensor(lengths), max(lengths), fill, bounds)
    least = SequenceLayout.packed(torch.tensor([1]), 1, multiple - 1, bounds)
    assert (layout.batch, layout.length) == (least.batch, least.length)
    assert layout.boundaries.shape == least.boundaries.shape
    assert layout.boundaries[-1] == layout.places.shape[0] == sum(lengths) + fill
    assert layout.lengths[: len(lengths)] == lengths
    tokens = torch.arange(1, sum(lengths) + fill + 1)
    assert torch.equal(layout.from_rectangle(layout.to_rectangle(tokens)), tokens)
    assert torch.equal(layout.to_rectangle(tokens) > 0, layout.rectangle_mask())


@pytest.mark.parametrize(
    ("pairs", "runs"),
    [
        (-1, [[4], [5], [5], [3], [1], [5]]),
        (0, [[4], [5, 5], [3], [1], [5]]),
        (9, [[4, 5, 5], [3, 1], [5]]),
        (15, [[4, 5, 5], [3, 1], [5]]),
        (24, [[4, 5, 5, 3, 1, 5]]),
    ],
)
def test_neighbors_of_similar_length_stand_together(pairs, runs):
    layout = SequenceLayout.packed(torch.tensor([4, 5, 5, 3, 1, 5]), 7)
    parts = layout.parts(pairs)
    assert [part.lengths for part in parts] == runs
    assert [part.length for part in parts] == [max(run) for run in runs]
    assert layout.parts(pairs) is parts


@pytest.mark.parametrize("fill", [0, 1, 5, 7])
def test_filling_is_no_token(fill):
    layout = SequenceLayout.packed(torch.tensor([2, 5, 3]), 5, fill)
    assert layout.lengths == [2, 5, 3] + {0: [], 1: [1], 5: [3, 2], 7: [3, 3, 1]}[fill]
    assert layout.fill == layout.to(torch.device("meta")).fill == fill
    real = layout.real_tokens()
    if not fill:
        assert real is None
        return
    assert real.tolist() == [True] * 10 + [False] * fill
    mask = torch.tensor([[True, False], [True, True]])
    assert SequenceLayout.rectangle(2, 2, mask).real_tokens().tolist() == [True, False, True, True]
    assert SequenceLayout.rectangle(2, 2).real_tokens() is None


def test_gradients_pass_both_ways():
    layout = SequenceLayout.packed(torch.tensor([2, 3]), 4)
    tokens = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layout.from_rectangle(layout.to_rectangle(x).square()), tokens)


def test_moving_keeps_everything():
    packed = SequenceLayout.packed(torch.tensor([2, 3]), 4)
    moved = packed.to(torch.device("meta"))
    assert moved.boundaries.is_meta
    assert moved.places.is_meta
    assert (moved.batch, moved.length, moved.key_mask) == (2, 4, None)
    rectangle = SequenceLayout.rectangle(1, 2, torch.ones(1, 2, dtype=torch.bool)).to(torch.device("meta"))
    assert rectangle.key_mask.is_meta
