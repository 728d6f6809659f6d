# SPDX-License-Identifier: Apache-2.0
"""The rank of a pipeline that takes most is found among all of them, wherever it is."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megatron_bert.planning.communication import step_messages
from megatron_bert.planning.devices import DEVICES, NETWORK
from megatron_bert.planning.fullest import distinct_ranks, fullest, fullest_ranks, most
from megatron_bert.planning.layouts import RECOMPUTATIONS, SHARDINGS, Layout, Stage, layouts, stages_of, why_not
from megatron_bert.planning.machine import Machine
from megatron_bert.planning.memory import rank_memory
from megatron_bert.planning.search import predict, search, usable_bytes
from megatron_bert.planning.step_time import step_time
from megatron_bert.planning.workload import TaskHead, Workload
from parallel.pipeline.schedules import SCHEDULES
from tests.megatron_bert.planning.test_closed_forms import workload

H100 = Machine(DEVICES["h100"], NETWORK)


def needed_by_rank(work: Workload, layout: Layout, stages: list[Stage]) -> list[float]:
    return [rank_memory(work, layout, stages, rank).needed for rank in range(layout.pipeline)]


def drawn(schedule: str, draw: random.Random) -> tuple[Workload, Layout, list[int] | None]:
    """A layout of a schedule with balanced stages, or with sizes of any kind."""
    pipeline, kind = draw.choice([2, 3, 4, 6, 8]), SCHEDULES[schedule]
    chunks = draw.randint(kind.chunks[0], kind.chunks[1] or 4)
    count = pipeline * chunks
    sizes = [draw.choice([1, 1, 2, draw.randint(1, 8)]) for _ in range(count)] if draw.random() < 0.6 else None
    layers = sum(sizes) if sizes else draw.randint(count, 3 * count)
    data, micro = draw.choice([1, 2, 8]), draw.choice([1, 4, 16])
    layout = Layout(
        tensor=draw.choice([1, 2]),
        pipeline=pipeline,
        data=data,
        schedule=schedule,
        chunks=chunks,
        micro_batch=micro,
        recompute=draw.choice(RECOMPUTATIONS),
        sharding=draw.choice(SHARDINGS),
    )
    work = replace(
        workload(hidden=draw.choice([128, 1024]), layers=layers),
        global_batch=micro * data * draw.randint(1, 4 * pipeline),
        compute=draw.choice(["bfloat16", "float32"]),
        graphs=layout.flat and draw.random() < 0.3,
        head=TaskHead() if draw.random() < 0.2 else None,
    )
    return work, layout, sizes


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_rank_takes_more_than_the_fullest(schedule: str) -> None:
    draw, left_out, elsewhere = random.Random(schedule), 0, 0
    for _ in range(60):
        work, layout, sizes = drawn(schedule, draw)
        stages = stages_of(work, layout, sizes)
        by_rank = needed_by_rank(work, layout, stages)
        rank, memory = fullest(work, layout, stages)
        assert memory.needed == by_rank[rank] == max(by_rank), (layout, sizes)
        predicted = predict(work, layout, H100, sizes)
        assert (predicted.fullest, predicted.memory) == (rank, memory)
        left_out += layout.pipeline - len(fullest_ranks(work, layout, stages))
        elsewhere += max(by_rank[0], by_rank[-1]) < max(by_rank)
    assert left_out, "ranks of which another one of the same kind holds as much are not looked at"
    assert elsewhere, "the ends of a pipeline are not always the fullest"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_takes_as_long_as_on_the_rank_where_it_takes_longest(schedule: str) -> None:
    draw = random.Random(schedule)
    for _ in range(20):
        work, layout, sizes = drawn(schedule, draw)
        stages = stages_of(work, layout, sizes)
        counts = [sum(stages[number].count for number in layout.stages_of(r)) for r in range(layout.pipeline)]
        assert most(layout, stages, lambda stage: stage.count) == max(counts)
        ranks = [step_messages(work, layout, stages, rank) for rank in range(layout.pipeline)]
        whole = step_time(work, layout, stages, ranks, H100)
        assert predict(work, layout, H100, sizes).time.seconds == pytest.approx(whole.seconds)
        alone = [step_time(work, layout, stages, [own], H100).seconds for own in ranks]
        assert whole.seconds == pytest.approx(max(alone))
        assert 0 in distinct_ranks(layout, stages)


def test_parameters_of_a_stage_are_those_of_its_root_and_layers() -> None:
    work, layout = workload(layers=7), Layout(pipeline=3, tensor=2)
    for stage in stages_of(work, layout):
        assert stage.count == sum(parameter.local(2) for parameter in stage.parameters)


def test_what_is_ranked_fits_on_every_rank() -> None:
    """On devices where some layouts fit on the ranks of their first and last stages alone."""
    work, small = workload(), Machine(DEVICES["l40s"], NETWORK)
    found = search(work, 7, small)
    assert found.ranked
    limit, fit, at_ends = usable_bytes(small), 0, 0
    for layout in layouts(work, 7):
        if why_not(work, layout):
            continue
        by_rank = needed_by_rank(work, layout, stages_of(work, layout))
        fit += max(by_rank) <= limit
        last = SCHEDULES[layout.schedule].placement.rank(layout.pipeline * layout.chunks - 1, layout.pipeline)
        at_ends += max(by_rank[0], by_rank[last]) <= limit
    assert found.tried - sum(found.out.values()) == fit < at_ends
    for prediction in found.ranked:
        layout = prediction.layout
        assert max(needed_by_rank(work, layout, stages_of(work, layout))) == prediction.memory.needed <= limit


def test_the_fastest_are_the_same_where_the_others_are_not_counted() -> None:
    work = replace(workload(layers=12), global_batch=64)
    whole, some = search(work, 4, H100), search(work, 4, H100, counted=False)
    assert [one.layout for one in whole.ranked] == [one.layout for one in some.ranked]
    assert whole.tried == some.tried
    more = search(work, 4, H100, most=60, counted=False)
    assert len(more.ranked) == 60
