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
    """One tensor from one stage to its neighbor on another rank, for one microbatch."""

    payload: Payload
    microbatch: int
    from_stage: int
    to_stage: int
    channel: Channel

    def __str__(self) -> str:
        return (
            f"{self.payload} of microbatch {self.microbatch} from stage {self.from_stage} (rank "
            f"{self.channel.source}) to stage {self.to_stage} (rank {self.channel.destination})"
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
    if channel.source == channel.destination:
        return None
    payload = Payload.ACTIVATION if producer.kind is ActionKind.FORWARD else Payload.GRADIENT
    return Message(payload, producer.microbatch, producer.stage, consumer.stage, channel)


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
    order = execution_order(schedule)
    places = {action: Place(rank, k) for rank, run in enumerate(schedule.actions) for k, action in enumerate(run)}
    channels = _channels(schedule)
    posts = _post_places(schedule, places, channels)
    finishes = _finish_places(schedule, places, channels, posts, _known_progress(schedule, places, order))
    post: list[list[list[Message]]] = [[[] for _ in actions] for actions in schedule.actions]
    finish: list[list[list[Message]]] = [[[] for _ in range(len(actions) + 1)] for actions in schedule.actions]
    for channel, messages in channels.items():
        for message in messages:
            post[channel.destination][posts[message]].append(message)
            finish[channel.source][finishes[message]].append(message)
    plans = []
    for rank, actions in enumerate(schedule.actions):
        steps = tuple(
            Step(
                tuple(post[rank][k]),
                incoming(schedule, action),
                tuple(finish[rank][k]),
                action,
                outgoing(schedule, action),
            )
            for k, action in enumerate(actions)
        )
        plans.append(RankPlan(steps, tuple(finish[rank][-1])))
    return tuple(plans)


def _channels(schedule: Schedule) -> dict[Channel, list[Message]]:
    """Each channel's messages in the order in which the source produces them."""
    channels: dict[Channel, list[Message]] = {}
    for actions in schedule.actions:
        for action in actions:
            message = outgoing(schedule, action)
            if message is not None:
                channels.setdefault(message.channel, []).append(message)
    return channels


def _ends(message: Message, places: dict[Action, Place], schedule: Schedule) -> tuple[int, int]:
    """Positions of the action that produces a message and of the one that consumes it."""
    if message.payload is Payload.ACTIVATION:
        kind = ActionKind.FORWARD
    else:
        kind = schedule.backward.kinds[0]
    produced = places[Action(kind, message.from_stage, message.microbatch)]
    consumed = places[Action(kind, message.to_stage, message.microbatch)]
    return produced.position, consumed.position


def _post_places(
    schedule: Schedule, places: dict[Action, Place], channels: dict[Channel, list[Message]]
) -> dict[Message, int]:
    """The position at which the destination posts each receive."""
    posts: dict[Message, int] = {}
    for messages in channels.values():
        latest = len(places)
        for message in reversed(messages):
            _, consumed = _ends(message, places, schedule)
            # Receives are posted in the channel's order: none later than those of the messages behind it.
            latest = min(latest, max(0, consumed - 1))
            posts[message] = latest
    return posts


def _known_progress(
    schedule: Schedule, places: dict[Action, Place], order: list[Place]
) -> dict[Place, tuple[int, ...]]:
    """For each action, how many actions of every rank have surely ended when it starts (vector clocks)."""
    known: dict[Place, tuple[int, ...]] = {}
    for place in order:
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


def _finish_places(
    schedule: Schedule,
    places: dict[Action, Place],
    channels: dict[Channel, list[Message]],
    posts: dict[Message, int],
    known: dict[Place, tuple[int, ...]],
) -> dict[Message, int]:
    """The position at which the source waits for each send; one past its last action for those at the very end."""
    finishes: dict[Message, int] = {}
    for channel, messages in channels.items():
        end = len(schedule.actions[channel.source])
        position = 0
        for message in messages:
            produced, _ = _ends(message, places, schedule)
            # Posts are in channel order, so a later message is never known to be posted before an earlier one.
            position = max(position, produced + 1)
            while position < end and known[Place(channel.source, position)][channel.destination] < posts[message]:
                position += 1
            finishes[message] = position
    return finishes
