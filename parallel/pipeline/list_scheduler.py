# SPDX-License-Identifier: Apache-2.0
"""Greedy list scheduling: schedules found by letting every rank take the most urgent action that is ready.

All actions take one slot, so the result depends on the sizes alone and is the same on every rank of a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from parallel.pipeline.actions import Action, ActionKind, Placement

_F, _I, _W = ActionKind.FORWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT


class ListSchedule(NamedTuple):
    """The actions of every rank, and the slots that they take."""

    actions: tuple[tuple[Action, ...], ...]
    slots: int


def list_schedule(
    ranks: int,
    microbatches: int,
    chunks: int,
    placement: Placement,
    kinds: tuple[ActionKind, ...],
    memory: int | None = None,
) -> ListSchedule:
    """Every rank's actions, chosen slot by slot.

    Among actions whose inputs are there, a rank takes the first of ``kinds``; of one kind, the one furthest along the
    pipeline, then the earliest microbatch.

    Args:
        ranks: pipeline ranks.
        microbatches: microbatches of one step.
        chunks: stages on each rank.
        placement: which rank holds which stage.
        kinds: the kinds to schedule, most urgent first.
        memory: stage-microbatches that a rank may hold from forward to weight gradient; None for no limit. A forward
            leaves room for the same microbatch's forwards on the rank's later chunks; otherwise early chunks could
            fill the memory and nothing would ever reach the loss.
    """
    queues = _Queues(ranks, microbatches, chunks, placement, kinds, memory)
    lists: list[list[Action]] = [[] for _ in range(ranks)]
    left = ranks * chunks * microbatches * len(kinds)
    slots = 0
    while left:
        chosen = [(rank, action) for rank in range(ranks) if (action := queues.most_urgent(rank)) is not None]
        assert chosen, "a memory limit of at least one microbatch on every chunk always lets some rank go on"
        # All ranks choose before any finishes: what one produces in this slot, another can use in the next.
        for rank, action in chosen:
            queues.finish(rank, action)
            lists[rank].append(action)
        left -= len(chosen)
        slots += 1
    return ListSchedule(tuple(tuple(actions) for actions in lists), slots)


@dataclass
class _Queues:
    """What has been done so far. Microbatches keep their order within a stage and kind, so counters say it all."""

    ranks: int
    microbatches: int
    chunks: int
    placement: Placement
    kinds: tuple[ActionKind, ...]
    memory: int | None
    done: dict[ActionKind, list[int]] = field(init=False)
    held: list[int] = field(init=False)

    def __post_init__(self) -> None:
        stages = self.ranks * self.chunks
        self.done = {kind: [0] * stages for kind in (_F, _I, _W)}
        self.held = [0] * self.ranks

    def most_urgent(self, rank: int) -> Action | None:
        """The action that a rank takes next, if any is ready."""
        stages = self.placement.stages(rank, self.ranks, self.chunks)
        for kind in self.kinds:
            # Furthest along is the last chunk for a forward, the first for a backward.
            for stage in reversed(stages) if kind is _F else stages:
                if self._ready(kind, stage, rank):
                    return Action(kind, stage, self.done[kind][stage])
        return None

    def finish(self, rank: int, action: Action) -> None:
        """Count an action as done."""
        self.done[action.kind][action.stage] += 1
        self.held[rank] += {_F: 1, _I: 0, _W: -1}[action.kind]

    def _ready(self, kind: ActionKind, stage: int, rank: int) -> bool:
        last = self.ranks * self.chunks - 1
        next_microbatch = self.done[kind][stage]
        if next_microbatch == self.microbatches:
            return False
        if kind is _W:
            return next_microbatch < self.done[_I][stage]
        if kind is _I:
            return next_microbatch < self.done[_F][stage] and (
                stage == last or next_microbatch < self.done[_I][stage + 1]
            )
        arrived = stage == 0 or next_microbatch < self.done[_F][stage - 1]
        later_chunks = self.chunks - 1 - stage // self.ranks
        return arrived and (self.memory is None or self.held[rank] + 1 + later_chunks <= self.memory)
