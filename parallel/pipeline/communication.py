# SPDX-License-Identifier: Apache-2.0
"""The messages between ranks that a schedule implies, and a plan to exchange them without waiting in a circle.

Each activation or gradient that crosses ranks is one message: one send where it is produced, one receive where it is
consumed. Neighboring stages on one rank (the turn of a V placement) need none.

The plan rests on channels. A channel is a directed pair of ranks; messages travel it in the order in which the source
produces them, and the destination posts its receives in that same order. The transport owes three things:

- sends and receives are asynchronous, and one waits for a given operation (``isend``, ``irecv`` and ``Work.wait``);
- operations on one channel match in order;
- channels are independent: an operation that waits on one never holds up another. On NCCL, whose point-to-point
  operations between two ranks share a stream in both directions, that takes two process groups: one for messages to
  higher ranks and one for messages to lower ranks.

A send may need its receive to be posted before it can complete (rendezvous). Then no rank can deadlock: posting never
waits, an action's receive waits only for the producer, and a send is waited for only where the sender can tell from
what it has itself received that the other side has posted the receive.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import NamedTuple

from parallel.pipeline.actions import Action, ActionKind, Schedule
from parallel.pipeline.dependencies import Place, execution_order


class Payload(StrEnum):
    """What a message carries."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"


class Channel(NamedTuple):
    """A directed pair of ranks."""

    source: int
    destination: int


@dataclass(frozen=True, slots=True)
class Message:
    """One tensor from the action that produces it to the one that consumes it on another rank."""

    producer: Action
    consumer: Action
    channel: Channel

    @property
    def payload(self) -> Payload:
        """What it carries."""
        return Payload.ACTIVATION if self.producer.kind is ActionKind.FORWARD else Payload.GRADIENT

    @property
    def microbatch(self) -> int:
        """Whose tensor it is."""
        return self.producer.microbatch

    def __str__(self) -> str:
        return (
            f"{self.payload} of microbatch {self.microbatch} from stage {self.producer.stage} (rank "
            f"{self.channel.source}) to stage {self.consumer.stage} (rank {self.channel.destination})"
        )


def incoming(schedule: Schedule, action: Action) -> Message | None:
    """The message that an action consumes."""
    producer = schedule.producer(action)
    return None if producer is None else _message(schedule, producer, action)


def outgoing(schedule: Schedule, action: Action) -> Message | None:
    """The message that an action produces."""
    consumer = schedule.consumer(action)
    return None if consumer is None else _message(schedule, action, consumer)


def _message(schedule: Schedule, producer: Action, consumer: Action) -> Message | None:
    channel = Channel(schedule.rank_of(producer.stage), schedule.rank_of(consumer.stage))
    return None if channel.source == channel.destination else Message(producer, consumer, channel)


@dataclass(frozen=True, slots=True)
class Step:
    """What a rank does for one action, in the order of the attributes.

    Attributes:
        post: receives to post, each into a fresh buffer.
        receive: the message to wait for: the action's input, posted here or earlier.
        finish: sends to wait for. Their receives are known to be posted, so this takes no more than the transfer;
            afterwards the sent tensors can be freed.
        action: the computation.
        send: the message to send, without waiting: the action's output.
    """

    post: tuple[Message, ...]
    receive: Message | None
    finish: tuple[Message, ...]
    action: Action
    send: Message | None


@dataclass(frozen=True)
class RankPlan:
    """Everything one rank does in one step.

    Attributes:
        steps: one for each of the rank's actions.
        finish: sends still to wait for after the last action.
    """

    steps: tuple[Step, ...]
    finish: tuple[Message, ...]


def plan_communication(schedule: Schedule) -> tuple[RankPlan, ...]:
    """When each rank posts its receives, starts its sends and waits for either.

    A receive is posted one action before the one that consumes it, so that the transfer overlaps that action, and
    earlier only where its channel's order demands it. That takes two or three buffers, whatever the number of
    microbatches. A sent output is kept until the receiver is known to have asked for it; in a warm-up, which hears
    nothing back, that can be as many as the rank holds activations of.

    Raises:
        ScheduleError: the lists deadlock.
    """
    places = {action: Place(rank, k) for rank, run in enumerate(schedule.actions) for k, action in enumerate(run)}
    known = _known_progress(schedule, places)
    channels: dict[Channel, list[Message]] = {}
    for run in schedule.actions:
        for action in run:
            if (message := outgoing(schedule, action)) is not None:
                channels.setdefault(message.channel, []).append(message)
    post: list[list[list[Message]]] = [[[] for _ in run] for run in schedule.actions]
    finish: list[list[list[Message]]] = [[[] for _ in range(len(run) + 1)] for run in schedule.actions]
    for (source, destination), messages in channels.items():
        posts = _post_positions([places[message.consumer].position for message in messages])
        progress = [known[Place(source, k)][destination] for k in range(len(schedule.actions[source]))]
        finishes = _finish_positions([places[message.producer].position for message in messages], posts, progress)
        for message, posted, finished in zip(messages, posts, finishes, strict=True):
            post[destination][posted].append(message)
            finish[source][finished].append(message)
    plans = []
    for rank, run in enumerate(schedule.actions):
        steps = (
            Step(tuple(posts), incoming(schedule, action), tuple(finishes), action, outgoing(schedule, action))
            for action, posts, finishes in zip(run, post[rank], finish[rank], strict=False)
        )
        plans.append(RankPlan(tuple(steps), tuple(finish[rank][-1])))
    return tuple(plans)


def _known_progress(schedule: Schedule, places: dict[Action, Place]) -> dict[Place, tuple[int, ...]]:
    """For each action, how many actions of every rank have surely ended when it starts (vector clocks)."""
    known: dict[Place, tuple[int, ...]] = {}
    for place in execution_order(schedule):
        rank, position = place
        clock = list(known[Place(rank, position - 1)]) if position else [0] * schedule.ranks
        clock[rank] = position
        producer = schedule.producer(schedule.actions[rank][position])
        if producer is not None:
            source = places[producer]
            clock = [max(pair) for pair in zip(clock, known[source], strict=True)]
            clock[source.rank] = max(clock[source.rank], source.position + 1)
        known[place] = tuple(clock)
    return known


def _post_positions(consumed: list[int]) -> list[int]:
    """Where the destination of a channel posts the receives of messages that it consumes at these positions.

    Receives are posted in the channel's order: none later than those of the messages behind it.
    """
    ahead = (max(0, position - 1) for position in reversed(consumed))
    return list(accumulate(ahead, min))[::-1]


def _finish_positions(produced: list[int], posts: list[int], progress: list[int]) -> list[int]:
    """Where the source of a channel waits for its sends; one past its last action for those at the very end.

    Args:
        produced: positions of the actions that produce the messages.
        posts: positions at which the destination posts their receives.
        progress: for each action of the source, how many of the destination have surely ended when it starts.
    """
    finishes, position = [], 0
    for made, posted in zip(produced, posts, strict=True):
        # Posts are in channel order, so a later message is never known to be posted before an earlier one.
        position = max(position, made + 1)
        while position < len(progress) and progress[position] < posted:
            position += 1
        finishes.append(position)
    return finishes
