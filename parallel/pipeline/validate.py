# SPDX-License-Identifier: Apache-2.0
"""Checks that a schedule computes the step it should, and that its ranks can run it without waiting in a circle."""

from __future__ import annotations

from itertools import product, starmap

from parallel.pipeline.actions import Action, ActionKind, Schedule, activations_in_flight
from parallel.pipeline.dependencies import ScheduleError, execution_order


def validate(schedule: Schedule, *, peak: int | None = None) -> None:
    """Check every property that the engine relies on.

    - every action stands on the rank of its stage, and every forward and backward that the step needs is there once;
    - on a rank a forward stands before its backward, and an input gradient before its weight gradient;
    - the ranks never wait in a circle, which includes that every action's input is produced.

    Args:
        peak: the most stage-microbatches of activations that a rank may hold; None for no limit.

    Raises:
        ScheduleError: naming the rank, the position and the action of the first fault found.
    """
    if len(schedule.actions) != schedule.ranks:
        raise ValueError(f"the schedule has {len(schedule.actions)} lists of actions for {schedule.ranks} ranks")
    for rank in range(schedule.ranks):
        _check_actions(schedule, rank)
        if peak is not None:
            _check_peak(schedule, rank, peak)
    execution_order(schedule)


def _check_actions(schedule: Schedule, rank: int) -> None:
    """The rank's list holds exactly the actions of its stages, once each, and their kinds in order."""
    kinds = (ActionKind.FORWARD, *schedule.backward.kinds)
    stages = schedule.stages_of(rank)
    seen: dict[Action, int] = {}
    for position, action in enumerate(schedule.actions[rank]):
        problem = None
        if action.stage not in stages:
            problem = f"the rank holds stages {', '.join(map(str, stages))}"
        elif action.kind not in kinds:
            problem = f"a schedule whose backward is {schedule.backward} has the kinds {', '.join(kinds)}"
        elif not 0 <= action.microbatch < schedule.microbatches:
            problem = f"the step has microbatches 0 to {schedule.microbatches - 1}"
        elif action in seen:
            problem = f"it also stands at position {seen[action]}"
        if problem is not None:
            raise ScheduleError(problem, rank, position, action)
        seen[action] = position
    for action in starmap(Action, product(kinds, stages, range(schedule.microbatches))):
        if action not in seen:
            raise ScheduleError("it is missing", rank, None, action)
    for action, position in seen.items():
        if index := kinds.index(action.kind):
            before = Action(kinds[index - 1], action.stage, action.microbatch)
            if seen[before] > position:
                raise ScheduleError(f"it stands before {before}, whose result it needs", rank, position, action)


def _check_peak(schedule: Schedule, rank: int, peak: int) -> None:
    for position, held in enumerate(activations_in_flight(schedule.actions[rank])):
        if held > peak:
            problem = f"the rank holds {held} stage-microbatches of activations and may hold {peak}"
            raise ScheduleError(problem, rank, position, schedule.actions[rank][position])
