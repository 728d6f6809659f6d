"""`megatron-bert finetune`: from a checkpoint and labelled data to a saved model and its scores."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_bert.config_checks import check_layout, check_learning_rate, check_tensor_size
from megatron_bert.finetuning.objective import Finetuning
from megatron_bert.finetuning.pictures import draw_run, draw_seeds
from megatron_bert.finetuning.results import RESULTS_FILE, read_results, write_json, write_results
from megatron_bert.finetuning.saved import save_task, task_config
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.finetuning.start import MODEL_FOLDER, encoder_config, find_tokenizer
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.tasks.registry import build_task
from megatron_bert.tasks.task import Task
from megatron_bert.training.metrics import Report
from megatron_bert.training.placement import placement_notes
from megatron_bert.training.run import find_resume, open_run
from megatron_bert.training.signals import StopRequest, note_stop
from megatron_bert.training.trainer import Trainer
from parallel.errors import UserError
from parallel.mesh import ParallelMesh
from parallel.process_group import World, launched_rank, launched_world_size, process_group, wait_as_spare


class Stopped(NamedTuple):
    """A run was asked to stop, and did after a step."""

    reason: str
    step: int


def finetune(settings: FinetuneSettings, *, ends_process: bool = False) -> str | None:
    """Train as the settings say, with one seed or several, resuming where an earlier run stopped.

    Args:
        settings: of the run.
        ends_process: whether the process ends after this; see :class:`StopRequest`.

    Returns:
        Why the run stopped before its end; None if it is done.

    Raises:
        UserError: settings, files or world size do not fit; found before any process group starts where possible.
    """
    layout = check_layout(settings, launched_world_size())
    if launched_rank() >= layout.world_size:
        wait_as_spare()
        return None
    tokenizer = find_tokenizer(settings)
    config = encoder_config(settings, tokenizer)
    check_tensor_size(layout.tensor, config.num_attention_heads, config.intermediate_size, config.vocab_size_multiple)
    task = build_task(settings.task, settings.data, tokenizer)
    _check_lengths(task, config)
    config = task_config(config, task)
    training = settings.training
    with process_group(training.device, settings.parallel.timeout_seconds, layout.world_size) as world:
        open_run(settings, world)
        mesh = ParallelMesh(layout, world.device)
        found: dict[int, dict[str, Any]] = {}
        with StopRequest(training.max_minutes, ends_process=ends_process) as stop:
            for seed in training.seeds or [training.seed]:
                run_dir = training.run_dir / f"seed_{seed}" if training.seeds else training.run_dir
                changed = training.model_copy(update={"seed": seed, "run_dir": run_dir, "seeds": None})
                results = _train(settings.model_copy(update={"training": changed}), config, task, mesh, world, stop)
                if isinstance(results, Stopped):
                    if world.is_first:
                        note_stop(training.run_dir, *results)
                    return results.reason
                found[seed] = results
        if training.seeds and world.is_first:
            _summarise(training.run_dir, found, task.metric)
    return None


def _check_lengths(task: Task, config: MegatronBertConfig) -> None:
    if task.max_length > config.max_position_embeddings:
        raise UserError(
            f"task.max_length is {task.max_length}, but the model takes at most {config.max_position_embeddings} "
            f"tokens: set task.max_length={config.max_position_embeddings} or less"
        )
    if config.type_vocab_size < 2:
        raise UserError(
            f"the model has {config.type_vocab_size} token type, but tasks tell two segments apart: start from one "
            "with 2"
        )


def _train(
    settings: FinetuneSettings,
    config: MegatronBertConfig,
    task: Task,
    mesh: ParallelMesh,
    world: World,
    stop: StopRequest,
) -> dict[str, Any] | Stopped:
    """One run with one seed: what it found."""
    training = settings.training
    if settings.checkpoint.resume == "auto" and (done := read_results(training.run_dir)) is not None:
        if world.is_first:
            print(f"{training.run_dir / RESULTS_FILE} is there: nothing left to do; remove it to train on")
        return done
    if settings.training.run_dir.name.startswith("seed_"):
        open_run(settings, world)
    resume_from = find_resume(settings)
    objective = Finetuning(settings, config, task, training.seed)
    check_learning_rate(settings.learning_rate, objective.total_steps)
    trainer = Trainer(settings, objective, mesh, world, resume_from)
    steps = objective.total_steps
    with Report(training.run_dir, settings.logging, active=world.is_first, start=trainer.step, steps=steps) as report:
        report.say(trainer.describe())
        report.say(f"{task.settings.name}: {len(objective.units):,} training sequences, {steps:,} steps")
        if task.bad_rows.count:
            report.say(f"skipped {task.bad_rows.count} bad rows, such as {task.bad_rows.reasons[0]}")
        report.say(f"resuming from {resume_from}" if resume_from else f"starting from {settings.model.from_}")
        for note in (*trainer.model.notes, *placement_notes(mesh.layout, resume_from)):
            report.say(f"note: {note}")
        reason = trainer.run(stop, report)
        if reason is not None:
            report.say(f"stopped by {reason} after step {trainer.step}: the same command goes on from there")
            return Stopped(reason, trainer.step)
        return _finish(settings, trainer, objective, report)


def _finish(settings: FinetuneSettings, trainer: Trainer, objective: Finetuning, report: Report) -> dict[str, Any]:
    """Score the best checkpoint on every split, and write what a run leaves behind."""
    run_dir, task = settings.training.run_dir, objective.task
    best = trainer.selection.best_step or trainer.step
    checkpoint = run_dir / "checkpoints" / f"step_{best:08d}"
    if best != trainer.step:
        trainer.load_weights(checkpoint)
    splits = {
        split: objective.run_split(split, trainer.model, trainer.evaluation_engine, trainer.mesh)
        for split in (*task.valid_splits, *task.test_splits)
    }
    if trainer.world.is_first:
        task = write_results(run_dir, settings, task, splits, step=best, steps=trainer.step)
        save_task(checkpoint, objective.config, task, run_dir / MODEL_FOLDER)
        draw_run(run_dir, objective.metric)
        for split, found in (read_results(run_dir) or {})["splits"].items():
            scores = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
            report.say(f"{split}, step {best}: {scores or 'not labelled; see the predictions'}")
        report.say(f"model, predictions and {RESULTS_FILE} are in {run_dir}")
    dist.barrier()
    return read_results(run_dir) or {}


def _summarise(run_dir: Path, found: dict[int, dict[str, Any]], metric: str) -> None:
    """Median and spread of every score over the seeds."""
    splits: dict[str, dict[str, dict[str, Any]]] = {}
    for split, scores in next(iter(found.values()))["splits"].items():
        splits[split] = {}
        for name in scores:
            values = [results["splits"][split][name] for results in found.values()]
            splits[split][name] = {
                "median": statistics.median(values),
                "lowest": min(values),
                "highest": max(values),
                "standard_deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
            }
    runs = {str(seed): results["splits"] for seed, results in found.items()}
    write_json(run_dir / RESULTS_FILE, {"seeds": list(found), "metric": metric, "splits": splits, "runs": runs})
    draw_seeds(run_dir, metric, runs)
    for split, scores in splits.items():
        for name, value in scores.items():
            print(
                f"{split} {name}: median {value['median']:.4f} of {len(found)} seeds, "
                f"{value['lowest']:.4f} to {value['highest']:.4f}"
            )
