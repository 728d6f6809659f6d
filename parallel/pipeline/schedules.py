# SPDX-License-Identifier: Apache-2.0
"""The schedules, and the one table that names them.

A schedule is a pure function of pipeline ranks p, microbatches m and chunks per rank v. To add one, write a function
that returns a `Schedule` and add a line to `SCHEDULES`; the validator, the simulator, the charts and the engine take it
as it is. Any m >= 1 is allowed everywhere: fewer microbatches than ranks, and any remainder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from parallel.errors import UserError, counted
from parallel.pipeline.actions import Action, ActionKind, Backward, Placement, Schedule
from parallel.pipeline.list_scheduler import list_schedule
from parallel.pipeline.zero_bubble import zero_bubble_h1, zero_bubble_v

_F, _B = ActionKind.FORWARD, ActionKind.BACKWARD
#: Microbatches times stages, far above any use, up to which the lists of actions fit into memory.
MOST_PASSES = 2**20


def gpipe(ranks: int, microbatches: int, chunks: int = 1) -> Schedule:
    """All forwards, then all backwards (Huang et al., arXiv 1811.06965).

    Bubble (p-1)/(m+p-1) and m microbatches of activations on every rank, for any m.
    """
    assert chunks == 1
    actions = tuple(
        tuple(Action(kind, rank, microbatch) for kind in (_F, _B) for microbatch in range(microbatches))
        for rank in range(ranks)
    )
    return Schedule("gpipe", ranks, 1, microbatches, Placement.LOOP, Backward.FULL, actions)


def one_forward_one_backward(ranks: int, microbatches: int, chunks: int = 1) -> Schedule:
    """1F1B: after a warm-up that fills the pipeline, every forward is followed by a backward (arXiv 2104.04473, 2.2).

    The bubble is GPipe's, (p-1)/(m+p-1) for any m, but rank r holds only min(m, p-r) microbatches of activations.
    """
    assert chunks == 1
    return _one_forward_one_backward("1f1b", ranks, microbatches, chunks)


def interleaved(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Interleaved 1F1B: each rank holds v chunks, which cuts the bubble by v (arXiv 2104.04473, section 2.2).

    Microbatches go through the chunks in rounds. Megatron-LM makes rounds of p and asks for m to be a multiple of p;
    here the remainder is spread over the rounds, so that none is smaller than p unless m is. A smaller last round
    would leave ranks waiting for each other in a circle.

    Bubble (p-1)/(vm+p-1) for any m >= p; with fewer microbatches the pipeline's depth decides and the step takes
    vp+m-1 slots. Activations: p(1 + (p-1)/(pv)) microbatches on rank 0 for m a multiple of p and m > p; a round of
    more than p microbatches adds (v-1)/v for each.
    """
    return _one_forward_one_backward("interleaved-1f1b", ranks, microbatches, chunks)


def forward_only(ranks: int, microbatches: int, chunks: int = 1, placement: Placement = Placement.LOOP) -> Schedule:
    """Forwards alone, for evaluation, with the stages placed as the training schedule placed them.

    Bubble (p-1)/(vm+p-1) for m >= p or one chunk. A V ends on the rank where it starts, so the last rank starts late
    and ends early: with two chunks in `Placement.V` the bubble is (p-1)/(m+p-1) for m >= p.
    """
    _check_sizes("forward-only", ranks, microbatches, chunks)
    if placement is Placement.LOOP:
        lists = tuple(tuple(_forwards(ranks, rank, chunks, rounds_of(ranks, microbatches))) for rank in range(ranks))
    else:
        lists = list_schedule(ranks, microbatches, chunks, placement, kinds=(_F,)).actions
    return Schedule("forward-only", ranks, chunks, microbatches, placement, Backward.NONE, lists)


def _forwards(ranks: int, rank: int, chunks: int, rounds: list[range]) -> list[Action]:
    """A rank's forwards: each round goes through all chunks before the next one starts."""
    stages = Placement.LOOP.stages(rank, ranks, chunks)
    return [Action(_F, stage, microbatch) for group in rounds for stage in stages for microbatch in group]


def _one_forward_one_backward(name: str, ranks: int, microbatches: int, chunks: int) -> Schedule:
    rounds = rounds_of(ranks, microbatches)
    actions = []
    for rank in range(ranks):
        stages = Placement.LOOP.stages(rank, ranks, chunks)
        forwards = _forwards(ranks, rank, chunks, rounds)
        backwards = [Action(_B, stage, i) for group in rounds for stage in reversed(stages) for i in group]
        # The last rank turns to backwards when a round has reached its last chunk. Every rank before it is one hop
        # earlier in the forward and one later in the backward. With several chunks both hops are filled with
        # forwards, so that later chunks wait for nobody; with one chunk that would only hold more activations.
        hops = (1 if chunks == 1 else 2) * (ranks - 1 - rank)
        warm_up = min(len(forwards), (chunks - 1) * len(rounds[0]) + hops)
        # The warm-up's forwards, then forward and backward in turn, then the backwards that are left.
        pairs = zip_longest(forwards[warm_up:], backwards)
        actions.append((*forwards[:warm_up], *(action for pair in pairs for action in pair if action is not None)))
    return Schedule(name, ranks, chunks, microbatches, Placement.LOOP, Backward.FULL, tuple(actions))


def rounds_of(ranks: int, microbatches: int) -> list[range]:
    """Microbatches in as many rounds of at least ``ranks`` as fit, as even as can be, larger ones first."""
    size, count, larger = round_sizes(ranks, microbatches)
    starts = [index * size + min(index, larger) for index in range(count + 1)]
    return [range(start, end) for start, end in pairwise(starts)]


def round_sizes(ranks: int, microbatches: int) -> tuple[int, int, int]:
    """Microbatches of the smallest round, how many rounds there are, and how many of them have one more."""
    count = max(1, microbatches // ranks)
    size, larger = divmod(microbatches, count)
    return size, count, larger


@dataclass(frozen=True)
class ScheduleKind:
    """One line of `SCHEDULES`.

    Attributes:
        build: the schedule for (ranks, microbatches, chunks).
        description: one line for people.
        chunks: the least and the most chunks per rank, None for no upper bound.
        placement: which rank holds which stage.
        backward: full, or split into input and weight gradients.
        bubble: closed form of the idle fraction for (p, m, v) with F = B_input = W of every stage and free
            communication. A lower bound where its docstring names a domain and the arguments are outside.
        peak: closed form of the activations held by the rank that holds most, in microbatches of all the layers of a
            rank (stage-microbatches divided by v).
    """

    build: Callable[[int, int, int], Schedule]
    description: str
    chunks: tuple[int, int | None]
    placement: Placement
    backward: Backward
    bubble: Callable[[int, int, int], float]
    peak: Callable[[int, int, int], float]

    @property
    def default_chunks(self) -> int:
        """The chunks a rank has when nobody says."""
        return self.chunks[0]


def _bubble_full(p: int, m: int, v: int) -> float:
    """(p-1)/(vm+p-1) for m >= p or v = 1; for fewer microbatches the step is as long as the pipeline is deep."""
    return 1 - v * m / max(v * m + p - 1, v * p + m - 1)


def _bubble_h1(p: int, m: int, _v: int) -> float:
    """(p-1)/(3m+p-1) for m >= p; else the first forward and the last backward cross the pipeline: 2m+2p-1 slots."""
    return 1 - 3 * m / (2 * m + p - 1 + max(m, p))


def _bubble_v(p: int, m: int, _v: int) -> float:
    """(p-1)/(6m+p-1): the last rank starts p-1 slots late. Reached for 2m >= 3p - 1; a lower bound below that."""
    return (p - 1) / (6 * m + p - 1)


def _peak_interleaved(p: int, m: int, v: int) -> float:
    """p(1+(p-1)/(pv)) for m a multiple of p and m > p; larger rounds hold more, small m all there is."""
    return min(m * v, (v - 1) * len(rounds_of(p, m)[0]) + 2 * (p - 1) + 1) / v


SCHEDULES: dict[str, ScheduleKind] = {
    "gpipe": ScheduleKind(
        gpipe,
        "all forwards, then all backwards: the simplest, holds every microbatch",
        (1, 1),
        Placement.LOOP,
        Backward.FULL,
        _bubble_full,
        lambda _p, m, _v: m,
    ),
    "1f1b": ScheduleKind(
        one_forward_one_backward,
        "GPipe's bubble with p microbatches of activations instead of m",
        (1, 1),
        Placement.LOOP,
        Backward.FULL,
        _bubble_full,
        lambda p, m, _: min(m, p),
    ),
    "interleaved-1f1b": ScheduleKind(
        interleaved,
        "v chunks per rank: bubble divided by v, messages multiplied by v",
        (2, None),
        Placement.LOOP,
        Backward.FULL,
        _bubble_full,
        _peak_interleaved,
    ),
    "zero-bubble-h1": ScheduleKind(
        zero_bubble_h1,
        "weight gradients fill the bubble: a third of it is left, memory as 1F1B",
        (1, 1),
        Placement.LOOP,
        Backward.SPLIT,
        _bubble_h1,
        lambda p, m, _: min(m, p),
    ),
    "zero-bubble-v": ScheduleKind(
        zero_bubble_v,
        "two chunks per rank in a V: first and last stage on rank 0, hardly any bubble, memory as 1F1B",
        (2, 2),
        Placement.V,
        Backward.SPLIT,
        _bubble_v,
        lambda p, m, _: min(m, p),
    ),
}


def build_schedule(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """The schedule of a name in `SCHEDULES`.

    Args:
        chunks: stages on each rank; None for the schedule's smallest.

    Raises:
        UserError: an unknown name, or sizes that the schedule does not allow.
    """
    kind = SCHEDULES.get(name)
    if kind is None:
        raise UserError(f"unknown pipeline schedule '{name}': choose one of {', '.join(SCHEDULES)}.")
    chunks = kind.default_chunks if chunks is None else chunks
    _check_sizes(name, ranks, microbatches, chunks)
    least, most = kind.chunks
    if chunks < least or (most is not None and chunks > most):
        allowed = f"exactly {least}" if most == least else f"at least {least}"
        raise UserError(
            f"schedule '{name}' was given {chunks} virtual stages per rank but takes {allowed}: change virtual_stages "
            "or the schedule."
        )
    return kind.build(ranks, microbatches, chunks)


def _check_sizes(name: str, ranks: int, microbatches: int, chunks: int) -> None:
    for what, value in (("pipeline ranks", ranks), ("microbatches", microbatches), ("virtual stages", chunks)):
        if value < 1:
            raise UserError(f"schedule '{name}' was given {value} {what}: give 1 or more.")
    if ranks * chunks * microbatches > MOST_PASSES:
        raise UserError(
            f"schedule '{name}' was given {microbatches:,} microbatches on {counted(ranks * chunks, 'stage')}: a step "
            f"has {MOST_PASSES // (ranks * chunks):,} at most; take larger ones, or fewer samples a step."
        )
