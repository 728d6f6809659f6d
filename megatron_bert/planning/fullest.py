# SPDX-License-Identifier: Apache-2.0
"""Which ranks of a pipeline can take most of anything, and the one that takes most memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache

from megatron_bert.planning.layouts import Layout, Stage
from megatron_bert.planning.memory import Moment, RankMemory, fewest_alike, fullest_moments, holds_all_of, rank_memory
from megatron_bert.planning.workload import Workload


def ranks_by_kind(layout: Layout, stages: list[Stage]) -> tuple[tuple[int, ...], ...]:
    """The ranks of a pipeline, those together whose stages are of the same kinds, chunk by chunk."""
    return _ranks_by_kind(layout.schedule, layout.pipeline, layout.chunks, tuple([stage.kind for stage in stages]))


@lru_cache(maxsize=4096)
def _ranks_by_kind(
    name: str, pipeline: int, chunks: int, kinds: tuple[tuple[int, bool, bool], ...]
) -> tuple[tuple[int, ...], ...]:
    layout = Layout(schedule=name, pipeline=pipeline, chunks=chunks)
    found: dict[tuple[tuple[int, bool, bool], ...], list[int]] = defaultdict(list)
    for rank in range(pipeline):
        found[tuple(kinds[number] for number in layout.stages_of(rank))].append(rank)
    return tuple(map(tuple, found.values()))


def distinct_ranks(layout: Layout, stages: list[Stage]) -> list[int]:
    """The first rank of each kind."""
    return [ranks[0] for ranks in ranks_by_kind(layout, stages)]


def most(layout: Layout, stages: list[Stage], cost: Callable[[Stage], float]) -> float:
    """What stages cost on the rank of a pipeline where it is most."""
    return max(
        sum(cost(stages[number]) for number in layout.stages_of(rank)) for rank in distinct_ranks(layout, stages)
    )


def fullest(workload: Workload, layout: Layout, stages: list[Stage]) -> tuple[int, RankMemory]:
    """The rank of a pipeline that takes most memory, and that."""
    by_rank = ((rank, rank_memory(workload, layout, stages, rank)) for rank in fullest_ranks(workload, layout, stages))
    return max(by_rank, key=lambda found: found[1].needed)


def fullest_ranks(workload: Workload, layout: Layout, stages: list[Stage]) -> list[int]:
    """The ranks of a pipeline one of which takes most memory; of any that is left out, one of them takes no less."""
    schedule = layout.schedule, layout.pipeline, fewest_alike(workload, layout), layout.chunks
    return [
        rank
        for ranks in ranks_by_kind(layout, stages)
        for rank in (_holding_most(*schedule, ranks, layout.flat) if len(ranks) > 1 else ranks)
    ]


@lru_cache(maxsize=4096)
def _holding_most(
    name: str, pipeline: int, microbatches: int, chunks: int, ranks: tuple[int, ...], flat: bool
) -> tuple[int, ...]:
    """Of ranks of a kind, those at whose moments no other one of them holds as much, by chunk, and more at some."""
    layout = Layout(schedule=name, pipeline=pipeline, chunks=chunks)
    found: dict[int, list[Moment]] = {}
    for rank in ranks:
        moments = _by_chunk(layout, rank, fullest_moments(name, pipeline, microbatches, chunks, rank, flat), flat)
        if not any(_has_all_of(more, moments) for more in found.values()):
            found = {other: less for other, less in found.items() if not _has_all_of(moments, less)}
            found[rank] = moments
    return tuple(found)


def _by_chunk(layout: Layout, rank: int, moments: tuple[Moment, ...], flat: bool) -> list[Moment]:
    """Moments of a rank with its chunks in place of stages, without what makes no difference to flat buffers."""
    chunk = {stage: index for index, stage in enumerate(layout.stages_of(rank))}
    return [
        moment._replace(
            stage=chunk[moment.stage],
            last=moment.last and not flat,
            held=tuple((chunk[stage], count) for stage, count in moment.held),
            queued=tuple((chunk[stage], count) for stage, count in moment.queued),
            ended=() if flat else tuple((chunk[stage], whole) for stage, whole in moment.ended),
        )
        for moment in moments
    ]


def _has_all_of(more: list[Moment], less: list[Moment]) -> bool:
    """Whether every moment of some has one of the others that is like it but may hold more."""
    return all(any(_alike(other, moment) and holds_all_of(other, moment) for other in more) for moment in less)


def _alike(one: Moment, other: Moment) -> bool:
    return (one.stage, one.forward, one.last, one.ended) == (other.stage, other.forward, other.last, other.ended)
