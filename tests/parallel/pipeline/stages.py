# SPDX-License-Identifier: Apache-2.0
"""Small stages that own nothing of BERT, and what a step over them gives: on one process, and on a pipeline."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.layers import ColumnParallelLinear, RowParallelLinear
from parallel.mesh import SINGLE
from parallel.pipeline.actions import Schedule
from parallel.pipeline.engine import PipelineEngine
from parallel.pipeline.p2p import PipelineTransport
from parallel.sharding import initialize
from tests.parallel.support import ToyNorm, uniform
from tests.worlds import CPU, make_mesh

SIZE, INNER = 6, 10
#: Matrix products of a stage's forward pass.
PRODUCTS = 2


class ToyStage(nn.Module):
    """x + row(gelu(column(norm(x)))): layers whose weight gradients can wait, and a norm whose cannot."""

    def __init__(self, number: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.norm = ToyNorm(SIZE, SINGLE)
        self.column = ColumnParallelLinear(SIZE, INNER, init_std=0.5)
        self.row = RowParallelLinear(INNER, SIZE, init_std=0.5)
        initialize(self, 5, prefix=f"{number}.")
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.row(F.gelu(self.column(self.norm(x))))


class ToyStep:
    """The microbatches of a step, each with a number of tokens of its own, and the losses that the last stage saw."""

    def __init__(self, schedule: Schedule, stages: dict[int, ToyStage], dtype: torch.dtype = torch.float64) -> None:
        self.schedule, self.stages = schedule, stages
        count = schedule.microbatches
        self.inputs = [uniform(3 + 2 * i % 5, SIZE, seed=i, dtype=dtype) for i in range(count)]
        self.targets = [uniform(*x.shape, seed=100 + i, dtype=dtype) for i, x in enumerate(self.inputs)]
        self.losses: dict[int, float] = {}

    def forward(self, stage: int, received: Tensor | None, index: int) -> Tensor:
        """A stage's forward pass, as the engine asks for it."""
        out = self.stages[stage](self.inputs[index] if received is None else received)
        if stage < self.schedule.stages - 1:
            return out
        loss = (out - self.targets[index]).square().sum()
        self.losses[index] = loss.item()
        return loss

    def shape(self, index: int) -> tuple[int, ...]:
        """Of activations between stages."""
        return tuple(self.inputs[index].shape)


def plain_step(schedule: Schedule, dtype: torch.dtype = torch.float64) -> tuple[dict[int, float], dict[str, Tensor]]:
    """Losses and gradients without a pipeline: stage after stage, microbatch after microbatch."""
    stages = {number: ToyStage(number, dtype) for number in range(schedule.stages)}
    step = ToyStep(schedule, stages, dtype)
    for index in range(schedule.microbatches):
        out: Tensor | None = None
        for number in range(schedule.stages):
            out = step.forward(number, out, index)
        assert out is not None
        out.backward()
    return step.losses, gradients_of(stages)


def gradients_of(stages: dict[int, Any]) -> dict[str, Tensor]:
    """By global name; every parameter has one."""
    gradients = {}
    for number, stage in stages.items():
        for name, parameter in stage.named_parameters():
            assert parameter.grad is not None, f"{number}.{name}"
            gradients[f"{number}.{name}"] = parameter.grad
    return gradients


def make_engine(
    schedule: Schedule, dtype: torch.dtype = torch.float64, *, record: bool = False
) -> tuple[PipelineEngine, ToyStep]:
    """This rank's engine over toy stages, in a world of as many ranks as the schedule has."""
    rank = dist.get_rank()
    stages = {number: ToyStage(number, dtype) for number in schedule.stages_of(rank)}
    transport = PipelineTransport.create(make_mesh(pipeline=schedule.ranks))
    engine = PipelineEngine(schedule, rank, stages, transport, dtype=dtype, device=CPU, record=record)
    return engine, ToyStep(schedule, stages, dtype)
