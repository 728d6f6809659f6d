# SPDX-License-Identifier: Apache-2.0
"""Forward and backward passes of micro batches as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from megatron_bert.model.batch import TokenBatch
from megatron_bert.training.run_state import RunState
from parallel.captured import CudaRecorders
from parallel.data_parallel import flat_buffers
from parallel.pipeline.actions import Action
from parallel.pipeline.captured_passes import CapturedPasses

#: Before the names of tensors of a batch's layout.
_LAYOUT = "layout."
#: Micro batches that run as they are before graphs are recorded: libraries and compilers set themselves up in them.
_WARMUPS = 3


class StepGraphs:
    """Runs the micro batches of steps, all of one shape, by replaying graphs of the pipeline's actions.

    The first steps run as they are.

    Args:
        trainer: of a model on flat buffers.
    """

    def __init__(self, trainer: RunState) -> None:
        self.trainer, self.engine = trainer, trainer.engine
        self.plain_steps = -(-_WARMUPS // self.engine.schedule.microbatches)
        #: Of a step so far; the last stage's graphs add to it.
        self.losses = torch.zeros(len(trainer.objective.loss_names), device=trainer.world.device)
        self._like: TokenBatch | None = None
        self.passes = CapturedPasses(
            self.engine.schedule,
            self.engine.rank,
            trainer.model.stages,
            self._forward,
            CudaRecorders(trainer.world.device),
        )

    def run(
        self, batches: Sequence[TokenBatch], counts: Tensor, losses: Tensor, scale: float, plain: Callable[[], None]
    ) -> None:
        """The forward and backward passes of a step.

        Args:
            batches: of this data rank.
            counts: what each loss sum is divided by.
            losses: which the loss sums are added to.
            scale: on the losses.
            plain: does the same without graphs.
        """
        if self.plain_steps:
            self.plain_steps -= 1
            plain()
            return
        shared = {"counts": counts, "scale": torch.full((), scale, device=losses.device)}
        for stage in self.trainer.model.stages.values():
            buffers = flat_buffers(stage)
            assert buffers is not None, "gradients stay where they are"
            if self.passes.graphs:
                buffers.wait_before_replay()
            else:
                buffers.wait()  # in what is recorded, nothing may be on its way
        shape = self.trainer.model.activation_shape(batches[0])
        if not self.passes.graphs:
            self._like = batches[0]
            activation = torch.zeros(shape, dtype=self.engine.dtype, device=losses.device)
            self.passes.record(tensors_of(batches[0]) | shared, activation)
        self.losses.zero_()

        def compute(action: Action, taken: Tensor | None) -> Tensor | None:
            return self.passes.run(action, taken, lambda index: tensors_of(batches[index]) | shared)

        self.engine.run_passes(compute, lambda _: shape)
        losses.add_(self.losses)

    def _forward(self, number: int, received: Tensor | None, given: Mapping[str, Tensor]) -> Tensor:
        assert self._like is not None, "graphs are recorded of a step's micro batch"
        batch, trainer = with_tensors(self._like, given), self.trainer
        stage = trainer.model.stages[number]
        output = stage(batch, trainer.dropout_seed, received)
        if not stage.part.last:
            assert isinstance(output, Tensor), "what another stage goes on with"
            return output
        sums = trainer.objective.loss_sums(output, batch, trainer.mesh.tensor_parallel)
        self.losses.add_(sums.detach())
        return (sums / given["counts"]).sum() * given["scale"]


def tensors_of(batch: TokenBatch) -> dict[str, Tensor]:
    """All tensors of a batch, those of its layout too, by name."""
    layout = {field.name: getattr(batch.layout, field.name) for field in fields(batch.layout)}
    return batch.tensors() | {_LAYOUT + name: value for name, value in layout.items() if isinstance(value, Tensor)}


def with_tensors(batch: TokenBatch, tensors: Mapping[str, Tensor]) -> TokenBatch:
    """The batch with others in place of its tensors.

    Args:
        batch: whose shapes they have.
        tensors: by the names that :func:`tensors_of` gives, and perhaps more.
    """
    names = tensors_of(batch)
    layout: dict[str, Any] = {name.removeprefix(_LAYOUT): tensors[name] for name in names if name.startswith(_LAYOUT)}
    own: dict[str, Any] = {name: tensors[name] for name in names if not name.startswith(_LAYOUT)}
    return replace(batch, layout=replace(batch.layout, **layout), **own)
