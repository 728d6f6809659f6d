# SPDX-License-Identifier: Apache-2.0
"""What a pipeline schedule is: every rank's list of actions, and where the stages live.

A schedule is data. The same lists are validated, simulated, drawn and executed; no other form of a schedule exists.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class ActionKind(StrEnum):
    """What an action computes; the value is its letter in the text form.

    ``BACKWARD`` is the whole backward pass of a stage. A zero-bubble schedule splits it: ``BACKWARD_INPUT`` gives the
    gradient of the stage's input, which the previous stage waits for, and ``BACKWARD_WEIGHT`` the gradients of its
    weights, which nothing waits for before the optimizer step (Qi et al., arXiv 2401.10241, section 2).
    """

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"


class Backward(StrEnum):
    """How a schedule runs the backward pass of each stage and microbatch."""

    NONE = "none"
    FULL = "full"
    SPLIT = "split"

    @property
    def kinds(self) -> tuple[ActionKind, ...]:
        """The actions that follow a forward, in their order."""
        return {
            Backward.NONE: (),
            Backward.FULL: (ActionKind.BACKWARD,),
            Backward.SPLIT: (ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT),
        }[self]


class Placement(StrEnum):
    """Which rank holds which stage when a rank holds several chunks.

    ``LOOP``: chunk c of rank r is stage ``c * ranks + r`` (Narayanan et al., arXiv 2104.04473, section 2.2).
    ``V``: every other chunk runs through the ranks backwards, so a chunk's last stage and the next one's first share a
    rank (Qi et al., section 6). With two chunks the first and the last stage are both on rank 0.
    """

    LOOP = "loop"
    V = "V"

    def rank(self, stage: int, ranks: int) -> int:
        """The rank that holds a stage."""
        chunk, offset = divmod(stage, ranks)
        return ranks - 1 - offset if self is Placement.V and chunk % 2 else offset

    def stages(self, rank: int, ranks: int, chunks: int) -> tuple[int, ...]:
        """The stages that a rank holds, by chunk."""
        return tuple(
            chunk * ranks + (ranks - 1 - rank if self is Placement.V and chunk % 2 else rank) for chunk in range(chunks)
        )


@dataclass(frozen=True, slots=True)
class Action:
    """One computation of one stage on one microbatch; its text form is such as ``3F1``: stage 3, microbatch 1."""

    kind: ActionKind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True)
class Schedule:
    """The actions of every rank for one step, in the order in which the rank runs them.

    Attributes:
        name: the schedule's name in `parallel.pipeline.schedules.SCHEDULES`.
        ranks: pipeline ranks.
        chunks: stages on each rank (virtual stages).
        placement: which rank holds which stage.
        backward: how each stage and microbatch runs its backward pass.
        actions: one tuple of actions per rank.
    """

    name: str
    ranks: int
    chunks: int
    microbatches: int
    placement: Placement
    backward: Backward
    actions: tuple[tuple[Action, ...], ...]

    def __str__(self) -> str:
        """One line a rank, in the text form of actions."""
        return "\n".join(" ".join(map(str, actions)) for actions in self.actions)

    @property
    def stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.ranks * self.chunks

    def rank_of(self, stage: int) -> int:
        """The rank that holds a stage."""
        return self.placement.rank(stage, self.ranks)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, by chunk."""
        return self.placement.stages(rank, self.ranks, self.chunks)

    def producer(self, action: Action) -> Action | None:
        """The action of a neighboring stage whose output this action takes; none at the ends of the pipeline."""
        return self._neighbor(action, -1)

    def consumer(self, action: Action) -> Action | None:
        """The action of a neighboring stage that takes this action's output; none at the ends of the pipeline."""
        return self._neighbor(action, 1)

    def _neighbor(self, action: Action, step: int) -> Action | None:
        if action.kind is ActionKind.BACKWARD_WEIGHT:
            return None
        stage = action.stage + (step if action.kind is ActionKind.FORWARD else -step)
        return Action(action.kind, stage, action.microbatch) if 0 <= stage < self.stages else None

    def last_backward(self, rank: int) -> dict[int, Action]:
        """The action after which the gradients of a stage are complete, by the stages of a rank."""
        ends = self.backward.kinds[-1:]
        return {action.stage: action for action in self.actions[rank] if action.kind in ends}

    def peak_activations(self) -> tuple[int, ...]:
        """The most activations that each rank holds at once, counted in microbatches of one stage.

        A rank holds a stage's activations from the forward to the end of the backward; a split backward keeps them
        until ``BACKWARD_WEIGHT``, which needs the inputs of the linear layers. Without a backward nothing is kept.
        """
        if self.backward is Backward.NONE:
            return (0,) * self.ranks
        return tuple(max(activations_in_flight(actions), default=0) for actions in self.actions)


def activations_in_flight(actions: Iterable[Action]) -> list[int]:
    """Microbatches of one stage whose activations are held after each action of a rank's list.

    A split backward ends with ``BACKWARD_WEIGHT``, a full one with ``BACKWARD``.
    """
    change = {ActionKind.FORWARD: 1, ActionKind.BACKWARD: -1, ActionKind.BACKWARD_INPUT: 0}
    held, counts = 0, []
    for action in actions:
        held += change.get(action.kind, -1)
        counts.append(held)
    return counts


def slots_in_flight(actions: Iterable[Action]) -> dict[Action, int]:
    """The slot of each action of a rank's list: micro batches that a stage holds at once have different ones.

    A micro batch takes the lowest slot of its stage that is free, from its forward pass to the end of its backward
    pass, so that a stage has as many as it ever holds micro batches.
    """
    taken: dict[int, dict[int, int]] = {}
    found = {}
    for action in actions:
        slots = taken.setdefault(action.stage, {})
        if action.kind is ActionKind.FORWARD:
            slots[action.microbatch] = next(n for n in range(len(slots) + 1) if n not in slots.values())
        found[action] = slots[action.microbatch]
        if action.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT):
            del slots[action.microbatch]
    return found
