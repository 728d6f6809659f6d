# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.pipelining's own orders, where they are right, are these schedules' orders."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from torch.distributed.pipelining import schedules as library

from parallel.pipeline.actions import Action, ActionKind, Backward, Placement, Schedule
from parallel.pipeline.schedules import build_schedule
from parallel.pipeline.simulate import Costs, simulate


def executed_order(kind, ranks, microbatches, rank):
    """What a library schedule really runs; its printed order of 1F1B is not what it runs."""
    ran = []
    stage = MagicMock(stage_index=rank)
    stage.forward_one_chunk.side_effect = lambda i, *_, **__: ran.append(f"{rank}F{i}")
    stage.backward_one_chunk.side_effect = lambda i, **_: ran.append(f"{rank}B{i}")
    for direction in ("fwd", "bwd"):
        for end in ("send", "recv"):
            getattr(stage, f"get_{direction}_{end}_ops").return_value = []
    runner = MagicMock(_stage=stage, _n_microbatches=microbatches, _num_stages=ranks)
    runner._check_inputs.return_value = ([()] * microbatches, [{}] * microbatches)
    kind._step_microbatches(runner)
    return ran


def planned_orders(kind, ranks, microbatches, chunks):
    """The actions that a library schedule of several stages per rank plans, without its idle slots."""
    rounds = max(1, microbatches // ranks)
    plan = SimpleNamespace(
        pp_group_size=ranks,
        n_local_stages=chunks,
        num_stages=ranks * chunks,
        _n_microbatches=microbatches,
        number_of_rounds=rounds,
        microbatches_per_round=microbatches // rounds,
    )
    operations = (kind._calculate_single_rank_operations(plan, rank) for rank in range(ranks))
    return tuple(
        tuple(
            Action(ActionKind(o.computation_type.value), o.stage_index, o.microbatch_index)
            for o in run
            if o is not None
        )
        for run in operations
    )


@pytest.mark.parametrize(("name", "kind"), [("gpipe", library.ScheduleGPipe), ("1f1b", library.Schedule1F1B)])
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 2), (4, 8), (4, 11)])
def test_same_order_as_the_library_runs(name, kind, ranks, microbatches):
    schedule = build_schedule(name, ranks, microbatches)
    for rank, actions in enumerate(schedule.actions):
        assert [str(action) for action in actions] == executed_order(kind, ranks, microbatches, rank)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (2, 8), (4, 4), (4, 8), (4, 10), (8, 32), (4, 3)])
@pytest.mark.parametrize("chunks", [2, 3])
def test_same_interleaved_order_as_the_library_plans(ranks, microbatches, chunks):
    ours = build_schedule("interleaved-1f1b", ranks, microbatches, chunks)
    assert ours.actions == planned_orders(library.ScheduleInterleaved1F1B, ranks, microbatches, chunks)


@pytest.mark.parametrize(
    ("name", "kind", "chunks"),
    [
        ("zero-bubble-h1", library.ScheduleInterleavedZeroBubble, 1),
        ("zero-bubble-v", library.ScheduleZBVZeroBubble, 2),
    ],
)
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 16), (8, 32), (4, 4)])
def test_zero_bubble_is_never_slower_and_holds_no_more_than_the_librarys(name, kind, chunks, ranks, microbatches):
    ours = build_schedule(name, ranks, microbatches)
    theirs = Schedule(
        "library",
        ranks,
        chunks,
        microbatches,
        Placement(ours.placement),
        Backward.SPLIT,
        planned_orders(kind, ranks, microbatches, chunks),
    )
    for costs in (Costs(), Costs(1, 1.3, 0.8)):
        assert simulate(ours, costs).makespan <= simulate(theirs, costs).makespan + 1e-9
    assert max(ours.peak_activations()) <= max(theirs.peak_activations())
