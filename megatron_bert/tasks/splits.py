# SPDX-License-Identifier: Apache-2.0
"""Dividing one file into parts for training, validation and testing."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from megatron_bert.tasks.settings import TaskDataSettings
from parallel.errors import UserError


def held_out_splits(data: TaskDataSettings) -> tuple[str, ...]:
    """The parts that are held out of the training file."""
    return tuple(part for part in ("valid", "test") if getattr(data, f"{part}_fraction") is not None)


def assign_parts(groups: Sequence[str], data: TaskDataSettings) -> dict[str, list[int]]:
    """Divide examples into "train" and the held-out parts: part -> indices of its examples, ascending.

    Groups are ordered by a hash of the seed and their name; the first make up the validation part, the next the test
    part. Which part an example is in thus depends on the seed and on the set of groups, not on their order.

    Args:
        groups: the group of each example; examples of one group stay in one part.

    Raises:
        UserError: a part would be empty.
    """
    parts = {"train": list(range(len(groups)))}
    sizes = Counter(groups)
    order = sorted(sizes, key=lambda group: hashlib.blake2b(f"{data.split_seed}:{group}".encode()).digest())
    part_of: dict[str, str] = {}
    for part in held_out_splits(data):
        wanted = round(getattr(data, f"{part}_fraction") * len(groups))
        taken = 0
        for group in order:
            if taken < wanted and group not in part_of:
                part_of[group] = part
                taken += sizes[group]
        parts[part] = [place for place, group in enumerate(groups) if part_of.get(group) == part]
    parts["train"] = [place for place, group in enumerate(groups) if group not in part_of]
    for part, places in parts.items():
        if not places:
            raise UserError(
                f"dividing {len(groups)} training examples in {len(sizes)} groups leaves none for {part}: change "
                "data.valid_fraction or data.test_fraction, or give a file for each part"
            )
    return parts
