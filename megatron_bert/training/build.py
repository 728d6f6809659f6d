# SPDX-License-Identifier: Apache-2.0
"""Building the model of a run, laid out over its ranks."""

from __future__ import annotations

from megatron_bert.config import RunSettings
from megatron_bert.model.stage import EncoderStage
from megatron_bert.training.objective import Objective
from megatron_bert.training.precision import DTYPES
from megatron_bert.training.staged_model import StagedModel
from parallel.data_parallel import apply_data_parallel
from parallel.mesh import ParallelMesh
from parallel.pipeline.actions import Schedule
from parallel.pipeline.tied import TiedParameter
from parallel.sharding import initialize


def build_model(
    settings: RunSettings, objective: Objective, schedule: Schedule, mesh: ParallelMesh, *, draw: bool
) -> StagedModel:
    """Build this rank's stages, each directly at its own size.

    Args:
        draw: give the parameters the values they start from; a checkpoint about to be loaded needs none.
    """
    notes: dict[str, None] = {}  # in order, each once
    parts = objective.stage_parts(schedule)
    stages: dict[int, EncoderStage] = {}
    for index in schedule.stages_of(mesh.coordinate["pipeline"]):
        stage = objective.make_stage(parts[index], mesh.tensor_parallel, settings.training.recompute, mesh.device)
        if draw:
            initialize(stage, settings.training.seed)
            notes |= dict.fromkeys(objective.fill(stage))
        objective.change(stage, fresh=draw)
        words = stage.word_embeddings
        if settings.training.compile:
            stage.compile_forward(everything=settings.training.compile == "all")
        apply_data_parallel(
            stage,
            stage.encoder.layer_list(),
            mesh,
            sharding=settings.parallel.sharding,
            compute_dtype=DTYPES[settings.precision.compute],
            cast_inputs=not objective.float32_activations,
            alone=[words] if objective.tied and schedule.stages > 1 and words is not None else [],
        )
        stages[index] = stage
    if settings.training.compile == "all":
        objective.compile_loss()
    tied: TiedParameter | None = None
    if objective.tied:
        first, last = stages.get(0), stages.get(schedule.stages - 1)
        tied = TiedParameter(
            mesh,
            first_rank=schedule.rank_of(0),
            last_rank=schedule.rank_of(schedule.stages - 1),
            first=None if first is None else first.word_embeddings,
            last=None if last is None else last.word_embeddings,
        )
    return StagedModel({**stages}, tied, tuple(notes))
