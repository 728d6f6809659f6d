# SPDX-License-Identifier: Apache-2.0
"""Checks that a schedule computes the step it should, and that its ranks can run it without waiting in a circle."""

from __future__ import annotations

from collections import defaultdict
from itertools import product, starmap

from parallel.pipeline.actions import Action, ActionKind, Schedule, activations_in_flight
from parallel.pipeline.communication import Channel, Message, RankPlan, incoming, outgoing, plan_communication
from parallel.pipeline.dependencies import ScheduleError, execution_order


def validate(schedule: Schedule, *, peak: int | None = None) -> None:
    """Check every property that the engine relies on.

    - every action stands on the rank of its stage, and every forward and backward that the step needs is there once;
    - on a rank a forward stands before its backward, and an input gradient before its weight gradient;
    - the ranks never wait in a circle, which includes that every action's input is produced;
    - both ends of each channel agree on the order of messages, and no wait of the plan can block (`validate_plan`).

    Args:
        schedule: the schedule.
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
    validate_plan(schedule, plan_communication(schedule))


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


def validate_plan(schedule: Schedule, plans: tuple[RankPlan, ...]) -> None:
    """Check a communication plan by running it with sends that need a posted receive, on channels that keep order.

    Every message must be sent and received once, in the same order at both ends of its channel; a receive must be
    posted before it is waited for; and no wait may stop all ranks.

    Raises:
        ScheduleError: naming the rank, the position and the action of the first fault found.
    """
    _check_ends(schedule, plans)
    posted: set[Message] = set()
    sent: set[Message] = set()
    position = [0] * schedule.ranks
    waits: list[Message | None] = [None] * schedule.ranks
    moved = True
    while moved:
        moved = False
        for rank, plan in enumerate(plans):
            while position[rank] < len(plan.steps):
                step = plan.steps[position[rank]]
                posted.update(step.post)
                if step.receive is not None and step.receive not in posted:
                    problem = f"it waits for the {step.receive} before the receive is posted"
                    raise ScheduleError(problem, rank, position[rank], step.action)
                waits[rank] = _blocked_on(step.receive, step.finish, sent, posted)
                if waits[rank] is not None:
                    break
                if step.send is not None:
                    sent.add(step.send)
                position[rank] += 1
                moved = True
    for rank, plan in enumerate(plans):
        at = position[rank]
        last = _blocked_on(None, plan.finish, sent, posted) if at == len(plan.steps) else waits[rank]
        if last is not None:
            at = min(at, len(plan.steps) - 1)
            raise ScheduleError(f"deadlock: it waits for ever for the {last}", rank, at, plan.steps[at].action)


def _blocked_on(
    receive: Message | None, finish: tuple[Message, ...], sent: set[Message], posted: set[Message]
) -> Message | None:
    """The first message that cannot end yet: a receive not yet sent, or a send whose receive is not posted."""
    if receive is not None and receive not in sent:
        return receive
    return next((message for message in finish if message not in posted), None)


def _check_ends(schedule: Schedule, plans: tuple[RankPlan, ...]) -> None:
    """Both ends of every channel agree; every send is finished once; every action has its own messages."""
    sends: dict[Channel, list[Message]] = defaultdict(list)
    posts: dict[Channel, list[tuple[Message, int]]] = defaultdict(list)
    for rank, plan in enumerate(plans):
        unfinished: set[Message] = set()
        for position, step in enumerate(plan.steps):
            if (step.receive, step.send) != (incoming(schedule, step.action), outgoing(schedule, step.action)):
                raise ScheduleError("its messages are not those of its neighbors", rank, position, step.action)
            for message in step.post:
                posts[message.channel].append((message, position))
            for message in step.finish:
                if message not in unfinished:
                    problem = f"it finishes the {message}, which is not under way"
                    raise ScheduleError(problem, rank, position, step.action)
                unfinished.remove(message)
            if step.send is not None:
                sends[step.send.channel].append(step.send)
                unfinished.add(step.send)
        if unfinished != set(plan.finish):
            message = min(unfinished ^ set(plan.finish), key=str)
            raise ScheduleError(f"the {message} is not finished", rank, len(plan.steps) - 1, plan.steps[-1].action)
    for channel in sends | posts:
        (source, rank), sent, posted = channel, sends[channel], posts[channel]
        steps = plans[rank].steps
        for message, (other, position) in zip(sent, posted, strict=False):
            if message != other:
                problem = f"it posts the {other} where rank {source} sends the {message}"
                raise ScheduleError(problem, rank, position, steps[position].action)
        if len(sent) != len(posted):
            problem = f"rank {source} sends {len(sent)} messages and {len(posted)} receives are posted"
            raise ScheduleError(problem, rank, len(steps) - 1, steps[-1].action)
