# SPDX-License-Identifier: Apache-2.0
"""A pipeline schedule: GPipe, whose backwards begin with the newest micro batch."""

from parallel.pipeline.actions import Action, ActionKind, Backward, Placement, Schedule
from parallel.pipeline.schedules import ScheduleKind


def reversed_gpipe(ranks: int, microbatches: int, chunks: int = 1) -> Schedule:
    """All forwards, then all backwards in reverse."""
    assert chunks == 1
    actions = []
    for rank in range(ranks):
        forwards = [Action(ActionKind.FORWARD, rank, number) for number in range(microbatches)]
        backwards = [Action(ActionKind.BACKWARD, rank, number) for number in reversed(range(microbatches))]
        actions.append((*forwards, *backwards))
    return Schedule("reversed", ranks, 1, microbatches, Placement.LOOP, Backward.FULL, tuple(actions))


REVERSED = ScheduleKind(
    reversed_gpipe,
    "GPipe from the newest micro batch back: holds every micro batch",
    (1, 1),
    Placement.LOOP,
    Backward.FULL,
    bubble=lambda p, m, _: (p - 1) / (m + p - 1),
    peak=lambda _p, m, _v: m,
)
