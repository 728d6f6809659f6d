# SPDX-License-Identifier: Apache-2.0
"""The model of a run, laid out over its ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from megatron_bert.config import RunSettings
from megatron_bert.model.batch import TokenBatch
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.training.objective import Objective
from megatron_bert.training.precision import DTYPES
from parallel.data_parallel import apply_data_parallel
from parallel.mesh import ParallelMesh
from parallel.pipeline.actions import Schedule
from parallel.pipeline.engine import PipelineEngine
from parallel.pipeline.tied import TiedParameter
from parallel.sharding import initialize

#: Global name of the parameter that the first and the last stage both hold.
TIED_NAME = "embeddings.word_embeddings.weight"


@dataclass(frozen=True)
class StagedModel:
    """This rank's stages of the model.

    Attributes:
        stages: by global stage index; see :meth:`Objective.make_stage`.
        tied: the word embeddings of the first and last stage; None where the last has no copy.
        notes: what the user should know of the weights they start from.
    """

    stages: dict[int, Any]
    tied: TiedParameter | None
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> MegatronBertConfig:
        """Of the whole model."""
        return next(iter(self.stages.values())).config

    def activation_shape(self, batch: TokenBatch) -> tuple[int, int]:
        """Shape of the hidden states between stages: ``[T, H]``, or ``[T/t, H]`` under sequence parallelism."""
        tp = next(iter(self.stages.values())).tp
        tokens = batch.tokens.shape[0]
        return tokens // tp.size if tp.sequence else tokens, self.config.hidden_size

    def run_forward(
        self,
        engine: PipelineEngine,
        batches: Sequence[TokenBatch],
        at_end: Callable[[int, Any], None] | None = None,
        stages: Mapping[int, Any] | None = None,
    ) -> None:
        """Run the stages over micro batches, without a backward pass.

        Args:
            engine: runs a forward-only schedule.
            batches: one for each micro batch of it.
            at_end: takes the number of a micro batch and what the last stage makes of it, where that is on this rank.
            stages: others to run in place of these, with activations of the same shapes.
        """
        running = self.stages if stages is None else stages

        def forward(stage: int, received: Tensor | None, index: int) -> Tensor:
            module = running[stage]
            output: Tensor = module(batches[index], None, received)
            if at_end is not None and module.part.last:
                at_end(index, output)
            return output

        engine.run(forward, lambda index: self.activation_shape(batches[index]))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Global name -> parameter, without the last stage's copy of the word embeddings."""
        return {
            name: parameter
            for stage in self.stages.values()
            for name, parameter in stage.named_parameters()
            if not self._is_copy(parameter)
        }

    def copies(self) -> dict[str, nn.Parameter]:
        """Global name -> the last stage's copy, on its rank, if it is another parameter than the first stage's."""
        copy = None if self.tied is None else self.tied.last
        return {TIED_NAME: copy} if copy is not None and self._is_copy(copy) else {}

    def copied(self) -> list[nn.Parameter]:
        """The parameters of this rank that two stages hold."""
        return [] if self.tied is None else self.tied.copies()

    def sum_tied_gradients(self) -> None:
        """Give both copies of the word embeddings the sum of their gradients."""
        if self.tied is not None:
            self.tied.sum_gradients()

    def reshard(self) -> None:
        """Give gathered parameters back after a forward pass that no backward pass follows."""
        for stage in self.stages.values():
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _is_copy(self, parameter: nn.Parameter) -> bool:
        return self.tied is not None and parameter is self.tied.last and parameter is not self.tied.first


def build_model(
    settings: RunSettings, objective: Objective, schedule: Schedule, mesh: ParallelMesh, *, draw: bool
) -> StagedModel:
    """Build this rank's stages, each directly at its own size.

    Args:
        settings: of the run.
        objective: what the run trains.
        schedule: which places the stages.
        mesh: where the run is laid out.
        draw: give the parameters the values they start from; a checkpoint about to be loaded needs none.
    """
    notes: dict[str, None] = {}  # in order, each once
    parts = objective.stage_parts(schedule)
    stages: dict[int, Any] = {}
    for index in schedule.stages_of(mesh.coordinate["pipeline"]):
        stage: Any = objective.make_stage(parts[index], mesh.tensor_parallel, settings.training.recompute, mesh.device)
        if draw:
            initialize(stage, settings.training.seed)
            notes |= dict.fromkeys(objective.fill(stage))
        objective.change(stage, fresh=draw)
        layers = stage.encoder.layer_list()
        if settings.training.compile:
            for layer in layers:
                layer.compile_forward()
        apply_data_parallel(
            stage,
            layers,
            mesh,
            sharding=settings.parallel.sharding,
            compute_dtype=DTYPES[settings.precision.compute],
            cast_inputs=not objective.float32_activations,
            alone=_alone(stage, schedule, objective),
        )
        stages[index] = stage
    if not objective.tied:
        return StagedModel(stages, None, tuple(notes))
    first, last = stages.get(0), stages.get(schedule.stages - 1)
    tied = TiedParameter(
        mesh,
        first_rank=schedule.rank_of(0),
        last_rank=schedule.rank_of(schedule.stages - 1),
        first=None if first is None else first.word_embeddings,
        last=None if last is None else last.word_embeddings,
    )
    return StagedModel(stages, tied, tuple(notes))


def _alone(stage: Any, schedule: Schedule, objective: Objective) -> list[nn.Parameter]:
    """The parameters of a stage that another stage has as well."""
    words = stage.word_embeddings
    return [words] if objective.tied and schedule.stages > 1 and words is not None else []
