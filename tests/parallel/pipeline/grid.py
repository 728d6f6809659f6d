# SPDX-License-Identifier: Apache-2.0
"""The sizes over which schedules are tested, actions by their texts, and what a plan needs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from parallel.pipeline.actions import Action, ActionKind, Schedule
from parallel.pipeline.communication import RankPlan
from parallel.pipeline.schedules import SCHEDULES, build_schedule, forward_only

RANKS = range(1, 9)


def chunk_choices(name: str) -> tuple[int, ...]:
    least, most = SCHEDULES[name].chunks
    return (least,) if most == least else (least, least + 1, least + 2)


def sizes(name: str) -> Iterator[tuple[int, int, int]]:
    """(ranks, microbatches, chunks): one microbatch, fewer than ranks, around a multiple of the ranks, and many."""
    for ranks in RANKS:
        counts = sorted({1, 2, ranks - 1, ranks, ranks + 1, (3 * ranks) // 2, 2 * ranks, 2 * ranks + 3, 4 * ranks + 1})
        for microbatches in counts:
            for chunks in chunk_choices(name):
                if microbatches >= 1:
                    yield ranks, microbatches, chunks


def every_schedule() -> Iterator[Schedule]:
    """All training schedules, on a coarser grid, and the forward-only ones of the same placements."""
    for name, kind in SCHEDULES.items():
        for ranks, microbatches, chunks in sizes(name):
            if ranks in (1, 2, 3, 4, 7) and chunks <= 3 and microbatches <= 2 * ranks + 3:
                yield build_schedule(name, ranks, microbatches, chunks)
                if name in ("1f1b", "interleaved-1f1b", "zero-bubble-v"):
                    yield forward_only(ranks, microbatches, chunks, kind.placement)


def action_of(text: str) -> Action:
    """The action of a text such as ``3F1``."""
    match = re.fullmatch(r"(\d+)([FBIW])(\d+)", text)
    assert match is not None
    stage, kind, microbatch = match.groups()
    return Action(ActionKind(kind), int(stage), int(microbatch))


def receive_buffers(plan: RankPlan) -> int:
    """The most receives that are posted and not yet consumed: buffers that the rank needs at once."""
    held = most = 0
    for step in plan.steps:
        held += len(step.post)
        most = max(most, held)
        held -= step.receive is not None
    return most


def send_buffers(plan: RankPlan) -> int:
    """The most sends that are not yet waited for: outputs that the rank keeps at once."""
    held = most = 0
    for step in plan.steps:
        held += (step.send is not None) - len(step.finish)
        most = max(most, held)
    return most
