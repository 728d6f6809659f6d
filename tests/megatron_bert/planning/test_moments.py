# SPDX-License-Identifier: Apache-2.0
"""What a rank holds in a step, found from a few micro batches: as much as from all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_bert.planning.devices import DEVICES, NETWORK
from megatron_bert.planning.layouts import Layout, stages_of
from megatron_bert.planning.machine import Machine
from megatron_bert.planning.memory import _in_flight, _moments, layout_of, rank_memory
from megatron_bert.planning.search import search
from megatron_bert.planning.workload import workload_of
from parallel.mesh import Sharding
from parallel.pipeline.schedules import SCHEDULES
from tests.megatron_bert.planning.support import Vocabulary, measured, settings_of
from tests.megatron_bert.planning.test_closed_forms import workload

SIZES = [
    (name, chunks, ranks, microbatches)
    for name, kind in SCHEDULES.items()
    for chunks in range(kind.chunks[0], (kind.chunks[1] or 3) + 1)
    for ranks, counts in {2: (1, 2, 9, 31), 3: (2, 13, 14, 38), 4: (7, 19, 26, 43), 7: (64,)}.items()
    for microbatches in counts
]


@pytest.mark.parametrize(("name", "chunks", "ranks", "microbatches"), SIZES)
def test_few_micro_batches_hold_as_much_as_all(name: str, chunks: int, ranks: int, microbatches: int) -> None:
    """Any remainder of rounds, weights that data ranks divide, and slots of CUDA graphs."""
    work = replace(workload(hidden=256, layers=24), global_batch=4 * microbatches)
    shardings: list[tuple[Sharding, bool]] = [("none", False), ("optimizer", True), ("full", False)]
    for sharding, graphs in shardings:
        own = replace(work, graphs=graphs)
        layout = Layout(pipeline=ranks, data=2, schedule=name, chunks=chunks, micro_batch=2, sharding=sharding)
        assert layout.microbatches(own) == microbatches
        stages = stages_of(own, layout)
        for rank in range(ranks):
            mine = [stages[number] for number in layout.stages_of(rank)]
            every = _in_flight(own, layout, mine, _moments(name, ranks, microbatches, chunks, rank))
            found = rank_memory(own, layout, stages, rank).parts
            assert sum(found[part] for part in every) == pytest.approx(sum(every.values()))


def test_no_list_is_as_long_as_a_step_has_micro_batches() -> None:
    found = search(replace(workload(), global_batch=2**30), 8, Machine(DEVICES["h100"], NETWORK))
    assert found.ranked
    assert max(prediction.layout.microbatches(prediction.workload) for prediction in found.ranked) > 2**18
    assert any("micro batches are more than a step can have" in reason for reason in found.out)


def test_rounds_with_a_remainder_agree_with_a_real_step() -> None:
    """One round of four micro batches before three of three."""
    ranks, microbatches = 3, 13
    settings = settings_of(
        f"model.num_hidden_layers={2 * ranks}",
        "model.hidden_size=128",
        "data.seq_length=128",
        f"parallel.pipeline={ranks}",
        "parallel.schedule=interleaved-1f1b",
        "parallel.virtual_stages=2",
        f"training.global_batch_size={8 * microbatches}",
        "training.micro_batch_size=8",
    )
    work = workload_of(settings, settings.model_config_for(Vocabulary.vocab_size, 0), 1, settings.data.seq_length)
    layout = layout_of(settings, ranks)
    memory = rank_memory(work, layout, stages_of(work, layout))
    assert memory.peak == pytest.approx(measured(settings, 0, ranks).peak_bytes, rel=0.01)
