# SPDX-License-Identifier: Apache-2.0
"""What the parts of a trainer see of it, so that they need not import it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from megatron_bert.config import RunSettings
from megatron_bert.model.batch import TokenBatch
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.training.objective import Objective
from megatron_bert.training.optimizer import ShardedOptimizer
from megatron_bert.training.precision import LossScale
from megatron_bert.training.staged_model import StagedModel
from parallel.checkpoint_writer import CheckpointWriter
from parallel.mesh import ParallelMesh
from parallel.parts import Part
from parallel.pipeline.engine import PipelineEngine
from parallel.process_group import World
from parallel.step_clock import StepClock


class StepSums(NamedTuple):
    """What a step did, on the device: this data rank's loss sums, global counts, and the gradient's norm."""

    losses: Tensor
    counts: Tensor
    grad_norm: Tensor


class RunState(Protocol):
    """A run between two steps; the trainer is one.

    Attributes:
        consumed_samples: of the training stream.
        skipped_samples: of the training stream, those that were left out after spikes.
        resumed: the checkpoint that the weights come from; None where the run began with its first step.
        parameters: global name -> parameter of this rank, without the last stage's copy of the word embeddings.
        copies: that copy, on its rank.
    """

    settings: RunSettings
    objective: Objective
    config: MegatronBertConfig
    mesh: ParallelMesh
    world: World
    clock: StepClock
    engine: PipelineEngine
    model: StagedModel
    parameters: dict[str, nn.Parameter]
    copies: dict[str, nn.Parameter]
    optimizer: ShardedOptimizer
    loss_scale: LossScale
    checkpoints: CheckpointWriter
    step: int
    consumed_samples: int
    skipped_samples: int
    resumed: Path | None
    dropout_seed: int

    def compute_gradients(self, batches: list[TokenBatch], began: Callable[[int, int], None] | None = None) -> StepSums:
        """The gradients of a step, complete; neither unscaled nor clipped.

        Args:
            began: called with stage and micro batch before every forward pass.
        """

    def tensors(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor | Part]:
        """Weights and optimizer states of parameters, by their names in checkpoints."""

    def resume(self, path: Path) -> None:
        """Take everything from a checkpoint of the run; every rank calls."""
