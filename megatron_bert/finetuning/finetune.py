# SPDX-License-Identifier: Apache-2.0
"""`megatron-bert finetune`: from a checkpoint and labeled data to a saved model and its scores."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from megatron_bert.config_checks import check_layout, check_learning_rate, check_tensor_size
from megatron_bert.convert.opening import open_checkpoint
from megatron_bert.convert.run_models import MODEL_FOLDER
from megatron_bert.convert.state import CanonicalState
from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.finetuning.objective import Finetuning, SplitResult
from megatron_bert.finetuning.pictures import draw_run
from megatron_bert.finetuning.results import RESULTS_FILE, finished, settled, write_results
from megatron_bert.finetuning.saved import save_task, task_config
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.finetuning.start import check_lengths, encoder_config, find_tokenizer
from megatron_bert.finetuning.summary import SEED, summarize
from megatron_bert.finetuning.units import TaskUnits
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.tasks.encoding import input_format
from megatron_bert.tasks.registry import build_task
from megatron_bert.tasks.task import Task
from megatron_bert.training.first_rank import on_first_rank
from megatron_bert.training.metrics import Report
from megatron_bert.training.placement import placement_notes
from megatron_bert.training.run import Start, check_device, find_start, write_start
from megatron_bert.training.run_lock import RunLock, owning
from megatron_bert.training.signals import StopRequest, note_stop
from megatron_bert.training.starting import start_trainer
from megatron_bert.training.trainer import Trainer
from parallel.checkpoint import checkpoint_step
from parallel.errors import DamagedCheckpointError, UserError
from parallel.mesh import ParallelLayout, ParallelMesh
from parallel.process_group import World, launched_rank, launched_world_size, process_group, wait_as_spare
from parallel.whole_files import whole_directory


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
    return run_all(settings, seed_variants(settings), FinetuneStage(), ends_process=ends_process)


class FinetuneStage:
    """What one run of the command does around training; quantization does more."""

    def objective(
        self,
        settings: FinetuneSettings,
        config: MegatronBertConfig,
        data: TaskUnits,
        seed: int,
        source: CanonicalState,
    ) -> Finetuning:
        """What is trained."""
        return Finetuning(settings, config, data, seed, source)

    def check(self, settings: FinetuneSettings, start: Start) -> None:
        """Before anything is written: what a run needs in its directory to go on.

        Raises:
            UserError: it is not there.
        """

    def begin(self, settings: FinetuneSettings, trainer: Trainer, report: Report) -> None:
        """Before the first step of a new run, or when one goes on."""

    def finish(self, settings: FinetuneSettings, trainer: Trainer, report: Report) -> dict[str, Any]:
        """Score the best checkpoint on every split, and write what a run leaves behind; every rank calls."""
        checkpoint = self.take_best(settings, trainer, report)
        splits = score_splits(trainer)
        return on_first_rank(lambda: self.leave(settings, trainer, report, checkpoint, splits))

    def take_best(self, settings: FinetuneSettings, trainer: Trainer, report: Report) -> Path:
        """Load the weights of the best checkpoint, or of the last one if that cannot be read; its path."""
        best, last = trainer.selection.best_step or trainer.step, trainer.step
        checkpoints = {step: settings.training.run_dir / "checkpoints" / f"step_{step:08d}" for step in (best, last)}
        if best == last:
            return checkpoints[last]
        try:
            trainer.load_weights(checkpoints[best])
        except DamagedCheckpointError as error:
            report.say(f"warning: {error}; it had the best score, and the model of step {last} is taken in its place")
            trainer.load_weights(checkpoints[last])
            return checkpoints[last]
        return checkpoints[best]

    def leave(
        self,
        settings: FinetuneSettings,
        trainer: Trainer,
        report: Report,
        checkpoint: Path,
        splits: Mapping[str, SplitResult],
    ) -> dict[str, Any]:
        """Write the model, pictures and, last of all, the results, which say that the run is finished; rank 0 calls."""
        run_dir, objective = settings.training.run_dir, cast(Finetuning, trainer.objective)
        task, splits = settled(objective.task, splits)
        self.save(settings, trainer, checkpoint, task)
        report.attempt("curves.png", "there is no picture of the run", lambda: draw_run(run_dir, objective.metric))
        step, beside = checkpoint_step(checkpoint) or 0, self.scores_beside()
        results = write_results(
            run_dir,
            settings,
            task,
            splits,
            step=step,
            steps=trainer.step,
            beside=beside,
            class_weights=objective.weight_of_class,
        )
        for split, found in results["splits"].items():
            scores = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
            report.say(f"{split}: {scores or 'not labeled; see the predictions'}")
        report.say(f"the model of step {step}, predictions and {RESULTS_FILE} are in {run_dir}")
        return results

    def save(self, settings: FinetuneSettings, trainer: Trainer, checkpoint: Path, task: Task) -> None:
        """Write the model of a checkpoint; rank 0 calls."""
        with whole_directory(settings.training.run_dir / MODEL_FOLDER) as directory:
            save_task(checkpoint, trainer.objective.config, task, directory)

    def scores_beside(self) -> dict[str, dict[str, float]]:
        """Scores of other models that stand in the results too."""
        return {}


def score_splits(trainer: Trainer) -> dict[str, SplitResult]:
    """What the model does on every split that there is; every rank calls."""
    objective = cast(Finetuning, trainer.objective)
    return {
        split: objective.run_split(split, trainer.model, trainer.evaluation_engine, trainer.mesh)
        for split in (*objective.task.valid_splits, *objective.task.test_splits)
    }


SettingsT = TypeVar("SettingsT", bound=FinetuneSettings)


def seed_variants(settings: SettingsT) -> dict[str, SettingsT]:
    """Name of a seed's directory -> settings of its run; one without a name where there is one seed."""
    training = settings.training
    if not training.seeds:
        return {"": settings}
    variants = {}
    for seed in training.seeds:
        name = f"{SEED}{seed}"
        changed = training.model_copy(update={"seed": seed, "run_dir": training.run_dir / name, "seeds": None})
        variants[name] = settings.model_copy(update={"training": changed})
    return variants


def run_all(
    settings: FinetuneSettings,
    variants: Mapping[str, FinetuneSettings],
    stage: FinetuneStage,
    *,
    ends_process: bool = False,
) -> str | None:
    """Run the variants of a command one after the other, in one world.

    Args:
        settings: of the command.
        variants: by directory below the command's.
        stage: what a run does.
        ends_process: as for :func:`finetune`.

    Returns:
        Why a run stopped before its end; None if all are done.

    Raises:
        UserError: settings, files or world size do not fit.
    """
    layout = check_layout(settings, launched_world_size())
    if launched_rank() >= layout.world_size:
        wait_as_spare()
        return None
    if len(variants) > 1 and settings.checkpoint.resume not in ("auto", "none"):
        raise UserError(
            f"checkpoint.resume is {settings.checkpoint.resume}, but there are {len(variants)} runs: give auto or "
            "none, or a single seed"
        )
    tokenizer = find_tokenizer(settings)
    with open_checkpoint(settings.model.from_) as source:  # once, for all of the runs
        return _run_from(source, settings, variants, stage, layout, tokenizer, ends_process=ends_process)


def _run_from(
    source: CanonicalState,
    settings: FinetuneSettings,
    variants: Mapping[str, FinetuneSettings],
    stage: FinetuneStage,
    layout: ParallelLayout,
    tokenizer: Tokenizer,
    *,
    ends_process: bool,
) -> str | None:
    encoder = encoder_config(settings, tokenizer, source)
    check_tensor_size(
        layout.tensor, encoder.num_attention_heads, encoder.intermediate_size, encoder.vocab_size_multiple
    )
    form = input_format(tokenizer, roberta=encoder.like_roberta)
    data = TaskUnits(build_task(settings.task, settings.data, tokenizer, form))
    check_lengths(data.task, encoder)
    training = settings.training
    done = {name: finished(variant, data.task) for name, variant in variants.items()}
    if done.get("") is not None:
        if launched_rank() == 0:
            print(f"{training.run_dir / RESULTS_FILE} is there: nothing left to do; remove it to train on")
        return None
    for split in data.task.splits:
        data.task.examples(split)  # what cannot be read is found before anything is trained

    def prepared(variant: FinetuneSettings) -> Run:
        config = task_config(encoder_config(variant, tokenizer, source), data.task)
        return _prepare(variant, stage, stage.objective(variant, config, data, variant.training.seed, source))

    runs = {name: prepared(variant) for name, variant in variants.items() if done[name] is None}
    with process_group(training.device, settings.parallel.timeout_seconds, layout.world_size) as world:
        check_device(settings, world)
        with (
            owning(training.run_dir, settings.parallel.timeout_seconds) as lock,
            StopRequest(training.max_minutes, ends_process=ends_process, lock=lock) as stop,
        ):
            mesh = ParallelMesh(layout, world.device)
            if "" not in variants:
                on_first_rank(lambda: write_start(settings))
            found: dict[str, dict[str, Any]] = {}
            for name, variant in variants.items():
                results: dict[str, Any] | Stopped | None = done[name]
                if results is None:
                    with _owning_below(lock, variant) as own:
                        results = _run_one(runs.pop(name), stage, mesh, world, stop, own)
                if isinstance(results, Stopped):
                    if world.is_first:
                        note_stop(training.run_dir, *results)
                    return results.reason
                found[name] = results
            if "" not in found:
                on_first_rank(lambda: summarize(training.run_dir, found, data.task))
    return None


def _owning_below(lock: RunLock, variant: FinetuneSettings) -> AbstractContextManager[RunLock]:
    """The lock of one of several runs' directory, in which a command of its own may train; or the command's lock."""
    run_dir = variant.training.run_dir
    if run_dir == lock.run_dir:
        return nullcontext(lock)
    return owning(run_dir, variant.parallel.timeout_seconds)


@dataclass(frozen=True)
class Run:
    """A run that can begin: its settings, what it trains, and where it begins."""

    settings: FinetuneSettings
    objective: Finetuning
    start: Start


def _prepare(settings: FinetuneSettings, stage: FinetuneStage, objective: Finetuning) -> Run:
    """Check what can be wrong with a run before anything of it is written."""
    if objective.total_steps > 0:
        check_learning_rate(settings.learning_rate, objective.total_steps)
    start = find_start(settings, objective)
    stage.check(settings, start)
    model = settings.training.run_dir / MODEL_FOLDER
    if start.checkpoint is None and model.exists():
        raise UserError(
            f"{model} is of an earlier run, of which no checkpoint is there to go on from: remove it to train in this "
            "directory, or set another training.run_dir"
        )
    return Run(settings, objective, start)


def _run_one(
    run: Run, stage: FinetuneStage, mesh: ParallelMesh, world: World, stop: StopRequest, lock: RunLock
) -> dict[str, Any] | Stopped:
    """One run: what it found."""
    settings, objective = run.settings, run.objective
    training, task, steps = settings.training, objective.task, objective.total_steps
    start, trainer = start_trainer(settings, objective, mesh, world, lock)
    placement = placement_notes(mesh.layout, start.checkpoint)
    on_first_rank(lambda: write_start(settings))
    if world.is_first:
        (training.run_dir / RESULTS_FILE).unlink(missing_ok=True)  # of an earlier run, if one starts from scratch
    with Report(training.run_dir, settings.logging, active=world.is_first, start=trainer.step, steps=steps) as report:
        report.say(trainer.describe())
        report.say(f"{task.settings.name}: {len(objective.units):,} training sequences, {steps:,} steps")
        if objective.weight_of_class is not None:
            weights = ", ".join(f"{label} {weight:.4g}" for label, weight in objective.weight_of_class.items())
            report.say(f"class weights: {weights}")
        if task.bad_rows.count:
            report.say(f"skipped {task.bad_rows.count} bad rows, such as {task.bad_rows.reasons[0]}")
        report.say(f"resuming from {start.checkpoint}" if start.checkpoint else f"starting from {settings.model.from_}")
        for note in (*trainer.model.notes, *start.notes, *placement):
            report.say(f"note: {note}")
        stage.begin(settings, trainer, report)
        reason = trainer.run(stop, report)
        if reason is not None:
            report.say(f"stopped by {reason} after step {trainer.step}: the same command goes on from there")
            return Stopped(reason, trainer.step)
        results = stage.finish(settings, trainer, report)
    trainer.close()
    return results
