# SPDX-License-Identifier: Apache-2.0
"""Greedy list scheduling: schedules found by letting every rank take the most urgent action that is ready.

All actions take one slot, so the result depends on the sizes alone and is the same on every rank of a run.
"""

from __future__ import annotations

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
        chunks: stages on each rank.
        placement: which rank holds which stage.
        kinds: the kinds to schedule, most urgent first.
        memory: stage-microbatches that a rank may hold from forward to weight gradient; None for no limit. A forward
            leaves room for the same microbatch's forwards on the rank's later chunks; otherwise early chunks could
            fill the memory and nothing would ever reach the loss.
    """
    last = ranks * chunks - 1
    # Microbatches keep their order within a stage and kind, so counters say it all.
    done = {kind: [0] * (last + 1) for kind in (_F, _I, _W)}
    held = [0] * ranks

    def ready(kind: ActionKind, stage: int, rank: int) -> bool:
        following = done[kind][stage]
        if following == microbatches:
            return False
        if kind is _W:
            return following < done[_I][stage]
        if kind is _I:
            return following < done[_F][stage] and (stage == last or following < done[_I][stage + 1])
        later_chunks = chunks - 1 - stage // ranks
        arrived = stage == 0 or following < done[_F][stage - 1]
        return arrived and (memory is None or held[rank] + 1 + later_chunks <= memory)

    def most_urgent(rank: int) -> Action | None:
        stages = placement.stages(rank, ranks, chunks)
        for kind in kinds:
            # Furthest along is the last chunk for a forward, the first for a backward.
            for stage in reversed(stages) if kind is _F else stages:
                if ready(kind, stage, rank):
                    return Action(kind, stage, done[kind][stage])
        return None

    lists: list[list[Action]] = [[] for _ in range(ranks)]
    left, slots = ranks * chunks * microbatches * len(kinds), 0
    while left:
        chosen = [(rank, action) for rank in range(ranks) if (action := most_urgent(rank)) is not None]
        assert chosen, "a memory limit of at least one microbatch on every chunk always lets some rank go on"
        # All ranks choose before any finishes: what one produces in this slot, another can use in the next.
        for rank, action in chosen:
            done[action.kind][action.stage] += 1
            held[rank] += {_F: 1, _I: 0, _W: -1}[action.kind]
            lists[rank].append(action)
        left -= len(chosen)
        slots += 1
    return ListSchedule(tuple(map(tuple, lists)), slots)
