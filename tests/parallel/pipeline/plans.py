# SPDX-License-Identifier: Apache-2.0
"""Whether communication plans hold what the engine relies on: they are run on channels that keep order."""

from __future__ import annotations

from collections import defaultdict

from parallel.pipeline.actions import Schedule
from parallel.pipeline.communication import Channel, Message, RankPlan, incoming, outgoing
from parallel.pipeline.dependencies import ScheduleError


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
