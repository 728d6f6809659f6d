# SPDX-License-Identifier: Apache-2.0
"""A real step of the real trainer on any rank of a world of any size, without its machines, memory or numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from megatron_bert.config import RunSettings, Settings
from megatron_bert.data.collate import collate, collate_rows
from megatron_bert.data.packing import LEAST_SAMPLES
from megatron_bert.data.sentence_pairs import Sample
from megatron_bert.finetuning.batches import collate_instances
from megatron_bert.finetuning.objective import Finetuning
from megatron_bert.model.attention import SCORES_PER_SEQUENCE
from megatron_bert.model.batch import MicroBatch, TokenBatch
from megatron_bert.model.finetuning import TaskBatch
from megatron_bert.planning.measuring import StepMeasurement, StepMeter, on_enter
from megatron_bert.planning.simulation import simulated_world, tensors_without_numbers
from megatron_bert.training.objective import Objective
from megatron_bert.training.optimizer import check_patterns
from megatron_bert.training.trainer import Trainer
from parallel.mesh import AXES, SINGLE, ParallelLayout, ParallelMesh
from parallel.pipeline.actions import Schedule

SettingsT = TypeVar("SettingsT", bound=RunSettings)


def dry_run_rank(
    settings: SettingsT, make_objective: Callable[[SettingsT], Objective], batch: TokenBatch, rank: int, world_size: int
) -> StepMeasurement:
    """Measure one step of one rank.

    Layers run as they are without ``torch.compile``.

    Args:
        settings: of the run, checked for the world size.
        batch: micro batch that the step repeats.
    """
    with tempfile.TemporaryDirectory() as folder:
        training = settings.training.model_copy(update={"compile": False, "run_dir": Path(folder)})
        settings = settings.model_copy(update={"training": training})
        layout = settings.layout(world_size)
        objective = make_objective(settings)
        names = _parameter_names(objective, settings.schedule(layout))
        if batch.layout.is_packed:  # a processor asks for the lengths of its sequences, which are known here alone
            batch.layout.parts(SCORES_PER_SEQUENCE // (objective.config.num_attention_heads // layout.tensor))
        with simulated_world(rank, world_size) as world:
            mesh = ParallelMesh(layout, world.device)
            meter = StepMeter({})
            with tensors_without_numbers(gpu=training.device != "cpu"), meter.counting():
                trainer = Trainer(settings, objective, mesh, world, None)
                check_patterns(chain(trainer.parameters, names), settings.optimizer, all_here=True)
                # There are no numbers to look at: the step is one whose gradients are finite.
                trainer.watch.at_once = False
                trainer.loss_scale.overflowed = lambda norm: False  # type: ignore[method-assign]  # noqa: ARG005
                meter.groups = _group_names(trainer)
                meter.hold(trainer.parameters.values(), "weights")
                meter.hold(trainer.copies.values(), "weights")
                held = [*trainer.parameters.values(), *trainer.copies.values()]
                meter.hold((p.grad for p in held if p.grad is not None), "gradients")
                _follow(trainer, meter)
                trainer.train_step([batch] * trainer.engine.schedule.microbatches)
            return meter.finish()


def _parameter_names(objective: Objective, schedule: Schedule) -> list[str]:
    """Of the stages of all ranks, which say together what patterns of names match."""
    parts = objective.stage_parts(schedule)
    stages = (objective.make_stage(part, SINGLE, "none", torch.device("meta")) for part in parts)
    return [name for stage in stages for name, _ in stage.named_parameters()]


def _follow(trainer: Trainer, meter: StepMeter) -> None:
    """Tell the meter which part of the step runs."""
    meter.begin_step()

    def enter(part: Any) -> Callable[[], None]:
        def act() -> None:
            meter.phase = part

        return act

    for stage in trainer.model.stages.values():
        on_enter(stage, enter("activations"))
        for name, module in stage.named_children():
            if name not in ("embeddings", "encoder"):
                on_enter(module, enter("logits"))
    run = trainer.engine.run

    def run_and_tell(*args: Any, **kwargs: Any) -> None:
        run(*args, **kwargs)
        meter.gradients_are_done()
        meter.phase = "temporaries"

    trainer.engine.run = run_and_tell  # type: ignore[method-assign]


def _group_names(trainer: Trainer) -> dict[str, str]:
    names: dict[str, str] = {trainer.mesh.device_mesh.get_group(axis).group_name: axis for axis in AXES}
    if trainer.transport is not None:
        names |= {group.group_name: "pipeline" for group in (trainer.transport.up, trainer.transport.down)}
    tied = trainer.model.tied
    if tied is not None and tied.group is not None:
        names[tied.group.group_name] = "tied"
    return names


def longest_batch(settings: Settings) -> MicroBatch:
    """A micro batch of samples that are as long as they can be, with as many masked tokens."""
    length, masked, size = settings.data.seq_length, settings.max_predictions, settings.training.micro_batch_size
    sample = Sample(
        tokens=np.full(length, 1),
        types=np.zeros(length),
        mask_positions=np.arange(masked),
        mask_labels=np.full(masked, 1),
        pair_label=-1 if settings.data.pair_objective == "none" else 0,
    )
    if settings.data.packed:
        most = settings.data.row_samples or LEAST_SAMPLES
        return collate_rows(
            [[(n, sample)] for n in range(size)], length=length, most=most, slots=settings.row_slots(most)
        )
    return collate([sample] * size, range(size), seq_length=length, max_predictions=masked, pad_id=0)


def longest_task_batch(objective: Finetuning, layout: ParallelLayout) -> TaskBatch:
    """A micro batch of instances that are all as the one with the longest sequence of the training data."""
    most = objective.most_features
    instance = max(objective.instances, key=lambda instance: max(len(feature.tokens) for feature in instance.features))
    longest = max(instance.features, key=lambda feature: len(feature.tokens))
    if most > 1:  # the choices of a question
        instance = replace(instance, features=(longest,) * most)
    size, multiple = objective.settings.training.micro_batch_size, layout.split_tokens
    return collate_instances(
        [instance] * size,
        range(size),
        objective.task.head,
        most_features=most,
        multiple=multiple,
        bounds=objective.bounds(multiple),
    )
