# SPDX-License-Identifier: Apache-2.0
"""Forward pass, loss and backward pass of a micro batch as one CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from megatron_bert.model.batch import TokenBatch
from megatron_bert.training.run_state import RunState
from parallel.captured import Captured, CudaRecorder
from parallel.data_parallel import flat_buffers, set_gradient_sync
from parallel.presence import sign

#: Before the names of tensors of a batch's layout.
_LAYOUT = "layout."


class MicroBatchGraph:
    """Adds the gradients of micro batches of one shape to flat buffers, by replaying a graph.

    The first micro batches run as they are. Sums over data ranks come after the last micro batch, and weights of other
    ranks are waited for before the first: the hooks that begin both earlier run in no replay.

    Args:
        trainer: of a model in one stage, on flat buffers.
    """

    def __init__(self, trainer: RunState) -> None:
        self.trainer = trainer
        (self.stage,) = trainer.model.stages.values()
        buffers = flat_buffers(self.stage)
        assert buffers is not None, "gradients stay where they are"
        self.buffers = buffers
        self._like: TokenBatch | None = None
        self.captured = Captured(self._passes, lambda: CudaRecorder(trainer.world.device))

    def run(self, batches: Sequence[TokenBatch], counts: Tensor, losses: Tensor, scale: float) -> None:
        """The micro batches of a step.

        Args:
            counts: what each loss sum is divided by.
            losses: which the loss sums are added to.
            scale: on the losses.
        """
        sign()
        self.buffers.wait()
        scaled = torch.full((), scale, device=losses.device)
        for batch in batches:
            with self.trainer.clock.on_device():
                set_gradient_sync(self.stage, last=False)
                self._like = batch
                losses.add_(self.captured({**tensors_of(batch), "counts": counts, "scale": scaled}))

    def _passes(self, given: Mapping[str, Tensor]) -> Tensor:
        assert self._like is not None, "a micro batch runs"
        batch, trainer = with_tensors(self._like, given), self.trainer
        output = self.stage(batch, trainer.dropout_seed)
        sums = trainer.objective.loss_sums(output, batch, trainer.mesh.tensor_parallel)
        ((sums / given["counts"]).sum() * given["scale"]).backward()
        return sums.detach()


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
