# SPDX-License-Identifier: Apache-2.0
"""What a trainer says: of what it is about to train, and of a step that is logged."""

from __future__ import annotations

from megatron_bert import backends
from megatron_bert.model.flops import parameter_count
from megatron_bert.training.learning_rate import learning_rate_at
from megatron_bert.training.memory import MemoryMeter
from megatron_bert.training.meter import Meter
from megatron_bert.training.metrics import Report
from megatron_bert.training.run_state import RunState
from megatron_bert.training.timeline import gather_timeline, write_timeline


def describe(trainer: RunState) -> str:
    """What is about to be trained, where and how."""
    layout, schedule, settings = trainer.mesh.layout, trainer.engine.schedule, trainer.settings
    kernels = ", ".join(
        f"{part} by {name}"
        for part, name in backends.report(trainer.world.device).items()
        if part != "Adam" or settings.optimizer.name == "adamw"
    )
    return (
        f"{parameter_count(trainer.config):,} parameters on {trainer.world.size} x {trainer.world.device.type}: tensor "
        f"{layout.tensor}{' (sequence parallel)' if layout.sequence else ''}, pipeline {layout.pipeline} "
        f"({schedule.name}, {schedule.microbatches} micro batches, {schedule.chunks} per rank), data {layout.data} "
        f"(sharding {settings.parallel.sharding}), {settings.precision.compute}, {settings.optimizer.name}; {kernels}"
    )


def log_step(
    trainer: RunState, losses: list[float], grad_norm: float, meter: Meter, memory: MemoryMeter, report: Report
) -> None:
    """Report the step that was made, and what the meters read; every rank calls.

    Args:
        losses: of the whole global batch, one for each name of the objective's.
    """
    rate = learning_rate_at(trainer.optimizer.steps, trainer.settings.learning_rate, trainer.objective.total_steps)
    report.step(
        {
            "step": trainer.step,
            "loss": sum(losses),
            **dict(zip(trainer.objective.loss_names, losses, strict=True)),
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "loss_scale": trainer.loss_scale.value if trainer.loss_scale.dynamic else None,
            "consumed_samples": trainer.consumed_samples,
            "skipped_samples": trainer.skipped_samples or None,
            **meter.read(),
            **memory.read(),
        }
    )
    for note in meter.ranks.notes:
        report.say(f"note: {note}")


def write_trace(trainer: RunState, report: Report) -> None:
    """Write the recorded actions of the step that was made; every rank calls."""
    timeline, folder = gather_timeline(trainer.engine, trainer.mesh), trainer.settings.training.run_dir / "traces"
    report.attempt(
        "the trace of a step",
        "steps until it can be have none",
        lambda: write_timeline(timeline, trainer.engine, folder, trainer.step),
    )
