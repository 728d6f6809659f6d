# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.pipelining's schedules, run on the same stages, give the same losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as library

from parallel.pipeline.actions import Schedule
from parallel.pipeline.schedules import build_schedule
from tests.parallel.pipeline.stages import SIZE, ToyStage, ToyStep, gradients_of, make_engine
from tests.parallel.support import uniform
from tests.worlds import CPU, Together

#: The library takes microbatches of one size only.
TOKENS = 5


def _same_size(step: ToyStep) -> ToyStep:
    count = step.schedule.microbatches
    step.inputs = [uniform(TOKENS, SIZE, seed=i, dtype=torch.float32) for i in range(count)]
    step.targets = [uniform(TOKENS, SIZE, seed=100 + i, dtype=torch.float32) for i in range(count)]
    return step


def _library_step(kind: Any, schedule: Schedule) -> tuple[list[float], dict[str, Tensor]]:
    rank = dist.get_rank()
    stages = {number: ToyStage(number, torch.float32) for number in schedule.stages_of(rank)}
    step = _same_size(ToyStep(schedule, stages, torch.float32))
    wrapped = [PipelineStage(stage, number, schedule.stages, CPU) for number, stage in stages.items()]
    runner = kind(
        wrapped if issubclass(kind, library.PipelineScheduleMulti) else wrapped[0],
        schedule.microbatches,
        loss_fn=lambda out, target: (out - target).square().sum(),
        scale_grads=False,
    )
    given = (torch.cat(step.inputs),) if 0 in stages else ()
    losses: list[Tensor] = []
    if schedule.stages - 1 in stages:
        runner.step(*given, target=torch.cat(step.targets), losses=losses)
    else:
        runner.step(*given)
    return [loss.item() for loss in losses], gradients_of(stages)


def _compare(kind: Any, *built: Any) -> None:
    schedule = build_schedule(*built)
    engine, step = make_engine(schedule, torch.float32)
    _same_size(step)
    engine.run(step.forward, step.shape)
    losses, gradients = _library_step(kind, schedule)
    assert [step.losses[index] for index in sorted(step.losses)] == pytest.approx(losses, rel=1e-6)
    mine = gradients_of(step.stages)
    assert mine.keys() == gradients.keys()
    for name, gradient in gradients.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(mine[name], gradient, rtol=0, atol=1e-6 * largest)


KINDS = [
    ("gpipe", library.ScheduleGPipe, 1),
    ("1f1b", library.Schedule1F1B, 1),
    ("interleaved-1f1b", library.ScheduleInterleaved1F1B, 2),
    ("interleaved-1f1b", library.ScheduleInterleaved1F1B, 3),
    ("zero-bubble-h1", library.ScheduleInterleavedZeroBubble, 1),
    ("zero-bubble-v", library.ScheduleZBVZeroBubble, 2),
]
SIZES = [(2, 4), (4, 8)]
WORLDS = Together(
    *((ranks, _compare, kind, name, ranks, count, chunks) for ranks, count in SIZES for name, kind, chunks in KINDS)
)


@pytest.mark.parametrize(("name", "kind", "chunks"), KINDS)
@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_same_losses_and_gradients_as_the_library(name, kind, chunks, ranks, microbatches):
    WORLDS(ranks, _compare, kind, name, ranks, microbatches, chunks)
