# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware training as an objective: fine-tuning in integer arithmetic, with ranges that follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bert.convert.ranges import VERSION
from megatron_bert.convert.state import CanonicalState
from megatron_bert.finetuning.instances import TaskInstances
from megatron_bert.finetuning.objective import Finetuning, SplitResult
from megatron_bert.ibert import (
    calibrate,
    compare_with_float,
    freeze_ranges,
    in_mode,
    named_ranges,
    quantize_model,
    update_ranges,
)
from megatron_bert.ibert.report import QuantizerReport
from megatron_bert.model.batch import TaskBatch, TokenBatch
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.finetuning import BertForTask
from megatron_bert.quantizing.settings import QuantizeSettings
from megatron_bert.training.staged_model import StagedModel
from parallel.errors import UserError
from parallel.mesh import DATA_AXES, ParallelMesh, TensorParallel
from parallel.object_collectives import gather_on_first
from parallel.pipeline.engine import PipelineEngine
from parallel.simulated_device import has_numbers


class QuantizationAware(Finetuning):
    """Fine-tuning whose forward pass is the integer specification.

    Args:
        source: the fine-tuned model, open while the run starts.
    """

    # Tensors between modules are integers times a power of two, which bfloat16 would round.
    float32_activations: ClassVar[bool] = True
    changes_after_step: ClassVar[bool] = True
    # Ranges are made before the first step, and their widths are part of the function.
    fixed_settings: ClassVar[tuple[str, ...]] = (*Finetuning.fixed_settings, "quantization.")

    def __init__(
        self,
        settings: QuantizeSettings,
        config: MegatronBertConfig,
        data: TaskInstances,
        seed: int,
        source: CanonicalState,
    ) -> None:
        super().__init__(settings, config, data, seed, source)
        if self.total_steps == 0:
            self.metric = None  # nothing is trained, so there is nothing to choose from
        self.quantization, self.distillation = settings.quantization, settings.distillation
        self.teachers: dict[int, BertForTask] = {}
        self.teaching_engine: PipelineEngine | None = None

    def change(self, stage: BertForTask, *, fresh: bool) -> None:
        """Quantize the stage; in a simulated run it stays as it is, for quantizers ask for numbers."""
        if has_numbers(next(stage.parameters())):
            quantize_model(stage, self.quantization.config(), equalize=fresh)

    def identity(self) -> dict[str, Any]:
        """That of fine-tuning, and the version of the arithmetic."""
        return super().identity() | {"arithmetic": VERSION}

    def check_identity(self, stored: dict[str, Any], path: str) -> None:
        """The arithmetic must be the same too: ranges and weights of another would go on as something else."""
        super().check_identity(stored, path)
        written = stored.get("arithmetic", 1)
        if written != VERSION:
            raise UserError(
                f"checkpoint {path} was trained in version {written} of the integer arithmetic, and this is {VERSION}: "
                "set another training.run_dir to quantize the float model again"
            )

    def extra_tensors(self, stage: BertForTask) -> dict[str, Tensor]:
        """Its ranges."""
        return named_ranges(stage)

    # ---------------------------------------------------------------- training

    def add_teacher(self, model: StagedModel, engine: PipelineEngine, device: torch.device) -> None:
        """Let the float model teach, with the weights that the run starts from.

        Args:
            model: whose stages the teacher's are like.
            engine: runs a forward-only schedule.
            device: of the teacher's parameters, which every data rank holds whole.
        """
        for index, stage in model.stages.items():
            teacher = self.make_stage(stage.part, stage.tp, "none", device)
            self.fill(teacher)
            self.teachers[index] = teacher.requires_grad_(False).eval()
        self.teaching_engine = engine

    def before_step(self, model: StagedModel, batches: list[TokenBatch]) -> list[TokenBatch]:
        """With the teacher's logits, where the last stage is."""
        if self.teaching_engine is None:
            return batches
        with_logits = list(batches)

        def teach(index: int, batch: TaskBatch, output: Tensor) -> None:
            with_logits[index] = replace(batch, taught=output)

        model.infer(self.teaching_engine, batches, teach, stages=self.teachers)
        return with_logits

    def loss_sums(self, output: Tensor, batch: TokenBatch, tp: TensorParallel) -> Tensor:
        """The task's loss, blended with the distance to the teacher."""
        loss = super().loss_sums(output, batch, tp)
        batch, wanted = cast(TaskBatch, batch), self.distillation
        if batch.taught is None:
            return loss
        apart = self.head_kind.distillation_sum(
            output,
            batch.taught,
            batch,
            self.task.head.problem,
            temperature=wanted.temperature,
            class_weights=self._class_weights(batch),
        )
        return (1.0 - wanted.weight) * loss + wanted.weight * apart

    def after_step(self, model: StagedModel, mesh: ParallelMesh) -> None:
        """Ranges move to what the step has seen, on all ranks alike."""
        for stage in model.stages.values():
            update_ranges(stage, range_groups(mesh))

    # ---------------------------------------------------------------- evaluation

    def run_split(self, split: str, model: StagedModel, engine: PipelineEngine, mesh: ParallelMesh) -> SplitResult:
        """Predict a split while ranges stay; every rank calls."""
        with evaluating(model):
            return super().run_split(split, model, engine, mesh)

    def calibrate(self, model: StagedModel, engine: PipelineEngine, mesh: ParallelMesh) -> None:
        """Find the ranges on training data; every rank calls."""
        rounds = self._rounds(self.quantization.calibration_steps, engine, mesh)
        with evaluating(model):
            calibrate(_together(model), rounds, partial(model.infer, engine), range_groups(mesh))

    def report(self, model: StagedModel, engine: PipelineEngine, mesh: ParallelMesh) -> list[QuantizerReport]:
        """Every quantizer beside the float model of the same weights on training data, in the order of the model.

        Every rank calls; rank 0 gets what its data rank saw in all stages.
        """
        rounds = self._rounds(self.quantization.report_steps, engine, mesh)
        with evaluating(model):
            rows = compare_with_float(_together(model), rounds, partial(model.infer, engine))
        # Names of several stages on a rank begin with the number of the stage on it.
        rows = [replace(row, name=row.name.lstrip("0123456789.")) for row in rows]
        mine = [(_stage_order(row), row) for row in rows]
        first = all(mesh.coordinate[axis] == 0 for axis in (*DATA_AXES, "tensor"))
        found = [pair for part in gather_on_first(mine if first else []) for pair in part]
        return [row for _, row in sorted(found, key=lambda pair: pair[0])]

    def _rounds(self, steps: int, engine: PipelineEngine, mesh: ParallelMesh) -> list[list[TokenBatch]]:
        """The micro batches of the first steps of training, step by step."""
        batches = self.training_batches(mesh, 0, steps, mesh.device)
        return [[next(batches) for _ in range(engine.schedule.microbatches)] for _ in range(steps)]


def range_groups(mesh: ParallelMesh) -> list[dist.ProcessGroup]:
    """The ranks whose observations count as one: those of the data and tensor axes."""
    return [mesh.device_mesh.get_group(axis) for axis in (*DATA_AXES, "tensor") if mesh.size[axis] > 1]


@contextmanager
def evaluating(model: StagedModel, *, floating: bool = False) -> Iterator[None]:
    """Ranges stay as they are while the block lasts; ``floating`` computes the float function of the weights."""
    stages = list(model.stages.values())
    with ExitStack() as stack:
        for stage in stages:
            stack.callback(stage.train, stage.training)
            stage.eval()
            if floating:
                stack.enter_context(in_mode(stage, "float"))
        yield


def freeze(model: StagedModel) -> None:
    """Fix the ranges of all stages."""
    for stage in model.stages.values():
        freeze_ranges(stage)


def _together(model: StagedModel) -> nn.Module:
    """This rank's stages as one module, whose parts keep their names."""
    stages = list(model.stages.values())
    return stages[0] if len(stages) == 1 else nn.ModuleList(stages)


def _stage_order(row: QuantizerReport) -> tuple[int, str]:
    """Embeddings, layers, then what comes after them."""
    layer = row.layer
    if layer is not None:
        return layer + 1, ""
    return (0, "") if "embeddings" in row.name else (1 << 20, "")
