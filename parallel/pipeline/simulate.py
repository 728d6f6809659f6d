# SPDX-License-Identifier: Apache-2.0
"""What a schedule costs: a timeline, the idle share of every rank, and the activations that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from parallel.errors import UserError
from parallel.pipeline.actions import Action, ActionKind, Schedule
from parallel.pipeline.dependencies import execution_order


@dataclass(frozen=True)
class Costs:
    """Times of the actions of one stage, in any one unit: a number for all stages, or a sequence with one per stage.

    A full backward takes ``backward_input + backward_weight``. ``communication`` is added to each message between
    ranks; it overlaps computation, so a rank is idle only while an action's input is under way.
    """

    forward: float | Sequence[float] = 1.0
    backward_input: float | Sequence[float] = 1.0
    backward_weight: float | Sequence[float] = 1.0
    communication: float = 0.0

    def duration(self, action: Action) -> float:
        """The time of one action."""
        match action.kind:
            case ActionKind.FORWARD:
                return _of_stage(self.forward, action.stage)
            case ActionKind.BACKWARD_INPUT:
                return _of_stage(self.backward_input, action.stage)
            case ActionKind.BACKWARD_WEIGHT:
                return _of_stage(self.backward_weight, action.stage)
            case ActionKind.BACKWARD:
                return _of_stage(self.backward_input, action.stage) + _of_stage(self.backward_weight, action.stage)

    def check(self, stages: int) -> None:
        """Refuse costs that do not fit a number of stages.

        Raises:
            UserError: a sequence of another length, or a time that is negative or not finite.
        """
        for name in ("forward", "backward_input", "backward_weight", "communication"):
            given = getattr(self, name)
            times = list(given) if isinstance(given, Sequence) else [given]
            if isinstance(given, Sequence) and len(times) != stages:
                raise UserError(f"{name} costs were given for {len(times)} stages of {stages}: give one per stage.")
            for time in times:
                if not 0 <= time < float("inf"):
                    raise UserError(f"{name} costs were given as {time:g}: give finite times of 0 or more.")


def _of_stage(cost: float | Sequence[float], stage: int) -> float:
    return cost[stage] if isinstance(cost, Sequence) else cost


@dataclass(frozen=True, slots=True)
class TimedAction:
    """An action with the rank that ran it and when, simulated or recorded."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The timed actions of one step: what charts draw, whether simulated or recorded.

    Attributes:
        ranks: pipeline ranks.
        events: all actions; those of one rank do not overlap and come in the order in which it ran them.
    """

    ranks: int
    events: tuple[TimedAction, ...]

    @cached_property
    def start(self) -> float:
        """When the first action starts."""
        return min((event.start for event in self.events), default=0.0)

    @cached_property
    def makespan(self) -> float:
        """Time from the start of the first action to the end of the last."""
        return max((event.end for event in self.events), default=0.0) - self.start

    def longer(self, factor: float) -> Timeline:
        """The same where everything takes so many times as long."""
        return Timeline(
            self.ranks,
            tuple(TimedAction(e.rank, e.action, e.start * factor, e.end * factor) for e in self.events),
        )

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Time that each rank computes."""
        busy = [0.0] * self.ranks
        for event in self.events:
            busy[event.rank] += event.end - event.start
        return tuple(busy)

    @property
    def rank_bubbles(self) -> tuple[float, ...]:
        """The share of the makespan in which each rank is idle."""
        return tuple(1 - busy / self.makespan if self.makespan else 0.0 for busy in self.busy)

    @property
    def bubble(self) -> float:
        """The idle share of the step over all ranks."""
        return sum(self.rank_bubbles) / self.ranks


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """When every action runs if each rank starts the next of its list as soon as it is free and the input is there.

    Args:
        costs: times of the actions; None for one unit for each of forward, input gradient and weight gradient.

    Raises:
        ScheduleError: the lists deadlock.
        UserError: costs that do not fit the schedule.
    """
    costs = costs or Costs()
    costs.check(schedule.stages)
    free = [0.0] * schedule.ranks
    ends: dict[Action, float] = {}
    events = []
    for rank, position in execution_order(schedule):
        action = schedule.actions[rank][position]
        start = free[rank]
        producer = schedule.producer(action)
        if producer is not None:
            crosses = schedule.rank_of(producer.stage) != rank
            start = max(start, ends[producer] + (costs.communication if crosses else 0.0))
        ends[action] = free[rank] = start + costs.duration(action)
        events.append(TimedAction(rank, action, start, ends[action]))
    return Timeline(schedule.ranks, tuple(events))
