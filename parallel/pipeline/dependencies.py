# SPDX-License-Identifier: Apache-2.0
"""The order that a schedule's data dependencies allow, and the error when there is none."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from parallel.pipeline.actions import Action, Schedule


class ScheduleError(ValueError):
    """A schedule that cannot be run, or would compute something else than the step.

    Attributes:
        rank: the pipeline rank at fault.
        position: index into that rank's actions; None when an action is missing.
        action: the action at fault.
    """

    def __init__(self, problem: str, rank: int, position: int | None, action: Action) -> None:
        where = f"rank {rank}, position {position}" if position is not None else f"rank {rank}"
        super().__init__(f"{where}, action {action}: {problem}")
        self.rank = rank
        self.position = position
        self.action = action


class Place(NamedTuple):
    """Where an action stands: the rank, and the index into its list."""

    rank: int
    position: int


def execution_order(schedule: Schedule) -> list[Place]:
    """All actions in an order that respects every rank's list and every producer before its consumer.

    This is what ranks do when sends never block and a receive waits for its message.

    Raises:
        ScheduleError: the lists deadlock.
    """
    done: set[Action] = set()
    waiting: dict[Action, list[int]] = {}
    position = [0] * schedule.ranks
    order: list[Place] = []
    runnable = deque(range(schedule.ranks))
    while runnable:
        rank = runnable.popleft()
        actions = schedule.actions[rank]
        while position[rank] < len(actions):
            action = actions[position[rank]]
            producer = schedule.producer(action)
            if producer is not None and producer not in done:
                waiting.setdefault(producer, []).append(rank)
                break
            done.add(action)
            order.append(Place(rank, position[rank]))
            position[rank] += 1
            runnable.extend(waiting.pop(action, ()))
    if waiting:
        raise _deadlock(schedule, position)
    return order


def _deadlock(schedule: Schedule, position: list[int]) -> ScheduleError:
    stuck = [rank for rank in range(schedule.ranks) if position[rank] < len(schedule.actions[rank])]
    waits = []
    for rank in stuck:
        action = schedule.actions[rank][position[rank]]
        producer = schedule.producer(action)
        assert producer is not None
        waits.append(
            f"rank {rank} at position {position[rank]} ({action}) waits for {producer} "
            f"of rank {schedule.rank_of(producer.stage)}"
        )
    first = stuck[0]
    action = schedule.actions[first][position[first]]
    return ScheduleError(f"deadlock: {'; '.join(waits)}", first, position[first], action)
