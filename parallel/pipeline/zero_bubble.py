# SPDX-License-Identifier: Apache-2.0
"""Zero-bubble schedules: weight gradients run where a rank would wait (Qi et al., arXiv 2401.10241)."""

from __future__ import annotations

from collections import Counter

from parallel.pipeline.actions import Action, ActionKind, Backward, Placement, Schedule
from parallel.pipeline.list_scheduler import list_schedule

_F, _I, _W = ActionKind.FORWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT


def zero_bubble_h1(ranks: int, microbatches: int, chunks: int = 1) -> Schedule:
    """ZB-H1: 1F1B whose weight gradients lag behind, no more memory than 1F1B's first rank (section 2.3).

    Rank r runs its weight gradients r microbatches late. So every rank holds p microbatches where 1F1B's rank r holds
    p-r, and the last ranks have weight gradients left to fill the time in which the pipeline drains.

    Bubble (p-1)(F+B-W) of time a rank: with F = B = W the fraction (p-1)/(3m+p-1), for m >= p. Fewer microbatches take
    2m+2p-1 slots, the least that the pipeline's depth allows.
    """
    assert chunks == 1
    actions = []
    for rank in range(ranks):
        warm_up = min(ranks - rank, microbatches)
        run = [Action(_F, rank, i) for i in range(warm_up)]
        weights = 0
        for microbatch in range(microbatches):
            run.append(Action(_I, rank, microbatch))
            forward = warm_up + microbatch
            if microbatch - weights >= rank or forward >= microbatches:
                run.append(Action(_W, rank, weights))
                weights += 1
            if forward < microbatches:
                run.append(Action(_F, rank, forward))
        run += [Action(_W, rank, i) for i in range(weights, microbatches)]
        actions.append(tuple(run))
    return Schedule("zero-bubble-h1", ranks, 1, microbatches, Placement.LOOP, Backward.SPLIT, tuple(actions))


def zero_bubble_v(ranks: int, microbatches: int, chunks: int = 2) -> Schedule:
    """ZB-V: two chunks per rank, the second running through the ranks backwards (section 6).

    The loss is on rank 0, so the first backward starts there right after the last forward, and all ranks reach the
    steady state at once. Each holds at most 2p stage-microbatches, p of a rank's layers, as 1F1B's first rank does.

    Bubble with F = B = W: the p-1 slots that the last rank waits for its first microbatch, (p-1)/(6m+p-1), for
    2m >= 3p-1. With fewer microbatches the pattern has gaps; there the shorter of two greedy schedules is taken, whose
    bubble is larger than that only when m is well below p or close to 3p/2.
    """
    assert chunks == 2
    if 2 * microbatches >= 3 * ranks - 1:
        lists = tuple(_v_pattern(ranks, rank, microbatches) for rank in range(ranks))
    else:
        # Forwards first reaches the loss sooner, backwards first drains sooner; which wins depends on the sizes.
        candidates = [
            list_schedule(ranks, microbatches, 2, Placement.V, kinds, memory=2 * ranks)
            for kinds in ((_I, _F, _W), (_F, _I, _W))
        ]
        lists = min(candidates, key=lambda candidate: candidate.slots).actions
    return Schedule("zero-bubble-v", ranks, 2, microbatches, Placement.V, Backward.SPLIT, lists)


def _v_pattern(ranks: int, rank: int, microbatches: int) -> tuple[Action, ...]:
    """The paper's figure 6 for one rank: warm-up in three parts, the repeated cycle, and the cool-down in two.

    In the words of a cycle, F0 is a forward of the rank's first chunk, I1 an input gradient of its second, and so on;
    each takes the next microbatch of its kind and chunk.
    """
    stages = Placement.V.stages(rank, ranks, 2)
    # The warm-up alone takes 2p-1 microbatches of the first chunk. With less there is nothing to take at its end.
    cycles = max(microbatches, 2 * ranks - 1)
    count: Counter[str] = Counter()
    actions: list[Action] = []

    def run(words: str, times: int) -> None:
        for word in words.split() * times:
            if count[word] < microbatches:
                actions.append(Action(ActionKind(word[0]), stages[int(word[1])], count[word]))
            count[word] += 1

    run("F0", 2 * (ranks - rank) - 1)
    run("F1 F0", rank)
    run("F1 I1 W1", ranks - rank)
    first_chunk = 2 * ranks - 1 - rank
    run("F0 I0 W0 F1 I1 W1", cycles - first_chunk)
    run("I0 W0 F1 I1 W1", first_chunk - ranks)
    run("I0 I1", rank)
    run("I0 W0", ranks - rank)
    run("W1", rank)
    run("W0", rank)
    return tuple(actions)
