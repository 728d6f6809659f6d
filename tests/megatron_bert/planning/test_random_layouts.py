# SPDX-License-Identifier: Apache-2.0
"""Layouts drawn at random: closed forms are a real step's."""

from __future__ import annotations

import random

import pytest

from megatron_bert.config import Settings
from megatron_bert.config_checks import check_settings
from megatron_bert.planning.communication import step_messages, totals
from megatron_bert.planning.layouts import stages_of
from megatron_bert.planning.memory import layout_of, rank_memory
from megatron_bert.planning.work import rank_flops
from megatron_bert.planning.workload import workload_of
from parallel.errors import UserError
from tests.megatron_bert.planning.support import Vocabulary, measured, settings_of


def drawn(seed: int) -> tuple[Settings, int, int]:
    """Settings, a number of ranks and one of them; of those that can be, the first that a seed gives."""
    draw = random.Random(seed)
    while True:
        tensor, pipeline, data = draw.choice([1, 2, 4]), draw.choice([1, 2, 4]), draw.choice([1, 2, 3, 8])
        schedules = (
            ["1f1b", "gpipe", "interleaved-1f1b", "zero-bubble-h1", "zero-bubble-v"] if pipeline > 1 else ["1f1b"]
        )
        schedule, micro = draw.choice(schedules), draw.choice([1, 2, 4, 8])
        count = draw.choice([1, 2, 3, 4]) * (pipeline if schedule == "interleaved-1f1b" else 1)
        sharding = draw.choice(["none", "optimizer", "full", "hybrid"])
        overrides = [
            f"model.hidden_size={draw.choice([128, 256])}",
            f"model.num_hidden_layers={draw.choice([8, 9]) // (1 if pipeline == 4 else 2)}",
            f"data.seq_length={draw.choice([64, 128, 256])}",
            f"data.pair_objective={draw.choice(['none', 'sop'])}",
            f"data.packed={draw.choice(['true', 'false'])}",
            f"precision.compute={draw.choice(['bfloat16', 'float32'])}",
            f"training.recompute={draw.choice(['none', 'selective', 'full'])}",
            f"training.micro_batch_size={micro}",
            f"training.global_batch_size={micro * count * data}",
            f"parallel.tensor={tensor}",
            f"parallel.sequence={'true' if tensor > 1 and draw.random() < 0.6 else 'false'}",
            f"parallel.pipeline={pipeline}",
            f"parallel.schedule={schedule}",
            f"parallel.sharding={sharding}",
            *(["parallel.virtual_stages=2"] if schedule == "interleaved-1f1b" else []),
            *(
                [f"parallel.shard_size={draw.choice([n for n in (1, 2, 4) if data % n == 0])}"]
                if sharding == "hybrid"
                else []
            ),
        ]
        ranks = tensor * pipeline * data
        try:
            settings = settings_of(*overrides)
            check_settings(settings, ranks)
        except UserError:
            continue
        return settings, draw.randrange(ranks), ranks


@pytest.mark.parametrize("seed", range(6))
def test_closed_forms_are_those_of_a_real_step(seed: int) -> None:
    settings, rank, ranks = drawn(seed)
    work = workload_of(settings, settings.model_config_for(Vocabulary.vocab_size, 0), 1, settings.data.seq_length)
    layout = layout_of(settings, ranks)
    stages = stages_of(work, layout)
    place, in_stage = divmod(rank, ranks // layout.pipeline)
    step = measured(settings, rank, ranks)
    assert rank_flops(work, layout, stages, place) == step.flops
    expected = totals(step_messages(work, layout, stages, place, in_stage // layout.tensor))
    assert expected == {tuple(what): (seen.count, seen.bytes) for what, seen in step.traffic.items()}
    needed = max(step.peak_bytes, step.building)
    # Small tensors come to a MiB or so.
    assert rank_memory(work, layout, stages, place).needed == pytest.approx(needed, rel=0.03, abs=1.5 * 2**20)
