# SPDX-License-Identifier: Apache-2.0
"""What a run trains: the part of a trainer that differs between pretraining and fine-tuning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from megatron_bert.model.batch import TokenBatch
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.stage import EncoderStage
from megatron_bert.training.staged_model import StagedModel
from parallel.mesh import ParallelMesh, TensorParallel
from parallel.pipeline.actions import Schedule
from parallel.pipeline.engine import PipelineEngine
from parallel.pipeline.stage import StagePart
from parallel.process_group import World
from parallel.recompute import Recompute

#: The class of an objective's stages.
StageT = TypeVar("StageT", bound=EncoderStage)


class Objective(ABC, Generic[StageT]):
    """A model, its data, its loss and its scores; every rank constructs the same.

    Attributes:
        starts_from: the checkpoint whose weights the first step starts from; None where it starts from random ones.
        total_steps: optimizer steps of the run.
        evaluates: whether there is anything to evaluate on.
        evaluate_every: steps between evaluations; 0 evaluates at the end only.
        loss_names: what each of the loss sums is called in reports.
        metric: the score by which the best checkpoint is chosen; None keeps the newest only.
        lower_is_better: whether a lower score is the better one.
        patience: evaluations without a better score after which the run ends; 0 never ends it.
        float32_activations: keep what goes between modules in float32, whatever the format of matrix products.
    """

    config: MegatronBertConfig
    starts_from: Path | None = None
    total_steps: int
    evaluates: bool = True
    evaluate_every: int
    loss_names: ClassVar[tuple[str, ...]]
    metric: str | None = None
    lower_is_better: ClassVar[bool] = False
    patience: int = 0
    float32_activations: ClassVar[bool] = False
    #: Beginnings of the names of settings that a run cannot change when it goes on from a checkpoint.
    fixed_settings: ClassVar[tuple[str, ...]] = ()
    #: Whether :meth:`after_step` changes what the next step computes, beside the optimizer.
    changes_after_step: ClassVar[bool] = False
    #: Whether the last stage has a copy of the word embeddings.
    tied: ClassVar[bool]

    @abstractmethod
    def stage_parts(self, schedule: Schedule) -> list[StagePart]:
        """What each stage holds of the model.

        Raises:
            UserError: more stages than layers, or stage sizes that do not fit.
        """

    @abstractmethod
    def make_stage(self, part: StagePart, tp: TensorParallel, recompute: Recompute, device: torch.device) -> StageT:
        """One stage, whose parameters hold no values yet."""

    def fill(self, stage: StageT) -> list[str]:  # noqa: ARG002
        """Give a new stage the weights it starts from; what is not among them keeps its initial values.

        Called before data parallelism divides the parameters.

        Returns:
            What the user should know.
        """
        return []

    def change(self, stage: StageT, *, fresh: bool) -> None:
        """Make of a stage what is trained, before data parallelism wraps it; nothing by default.

        Args:
            stage: filled, or about to be loaded from a checkpoint of the run.
            fresh: whether it is filled.
        """

    def compile_loss(self) -> None:
        """Compile what :meth:`loss_sums` computes; it stays as it is by default."""

    def extra_tensors(self, stage: StageT) -> dict[str, Tensor]:  # noqa: ARG002
        """What checkpoints hold of a stage beside its parameters: global name -> tensor, the same on every rank."""
        return {}

    def before_step(self, model: StagedModel, batches: list[TokenBatch]) -> list[TokenBatch]:  # noqa: ARG002
        """The micro batches of a step with all that their losses need; as they are by default."""
        return batches

    def after_step(self, model: StagedModel, mesh: ParallelMesh) -> None:
        """Called after a step; nothing by default."""

    @abstractmethod
    def prepare(self, mesh: ParallelMesh, world: World) -> None:
        """Open the data, before the first step."""

    @abstractmethod
    def describe_data(self, first_step: int) -> list[str]:
        """What rank 0 says of the data once they are prepared, where the run starts after step ``first_step``."""

    @abstractmethod
    def training_batches(
        self, mesh: ParallelMesh, first_sample: int, steps: int, device: torch.device
    ) -> Iterator[TokenBatch]:
        """The micro batches of this data rank for ``steps`` steps, from sample ``first_sample`` of the stream."""

    @abstractmethod
    def counts(self, batches: list[TokenBatch]) -> Tensor:
        """How many terms each loss sum over the micro batches has, or what they weigh: ``[losses]``."""

    @abstractmethod
    def loss_sums(self, output: Any, batch: TokenBatch, tp: TensorParallel) -> Tensor:
        """Sums of the last stage's losses over a micro batch: float32 ``[losses]``.

        Sums, not means: they are divided by the counts of the whole global batch, so that the result does not depend
        on how the batch was cut.
        """

    @abstractmethod
    def evaluate(self, model: StagedModel, engine: PipelineEngine, mesh: ParallelMesh) -> dict[str, float]:
        """Held-out scores without dropout; every rank calls and gets the same."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a checkpoint's run and this one must have in common (JSON), such as the tokenizer's fingerprint."""

    @abstractmethod
    def check_identity(self, stored: dict[str, Any], path: str) -> None:
        """Refuse to resume from a checkpoint of another identity.

        Raises:
            UserError: it was trained on something else.
        """
