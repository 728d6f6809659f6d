# SPDX-License-Identifier: Apache-2.0
"""`megatron-bert finetune`: from a checkpoint and labeled data to a saved model and its scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch

from megatron_bert.config_checks import check_layout, check_learning_rate, check_tensor_size
from megatron_bert.convert.opening import open_checkpoint
from megatron_bert.convert.run_models import MODEL_FOLDER
from megatron_bert.finetuning.instances import TaskInstances
from megatron_bert.finetuning.objective import Finetuning, SplitResult
from megatron_bert.finetuning.pictures import draw_run
from megatron_bert.finetuning.results import RESULTS_FILE, finished, settled, write_results
from megatron_bert.finetuning.saved import save_task, task_config
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.finetuning.start import check_lengths, encoder_config, find_tokenizer
from megatron_bert.finetuning.summary import SEED, summarize
from megatron_bert.tasks.encoding import input_format
from megatron_bert.tasks.registry import build_task
from megatron_bert.training.metrics import Report
from megatron_bert.training.objective import Objective
from megatron_bert.training.run import Start, find_start, write_start
from megatron_bert.training.run_lock import RunLock, owning
from megatron_bert.training.running import Procedure, Stopped, is_spare, opened, train
from megatron_bert.training.trainer import Trainer
from parallel.checkpoint import checkpoint_step
from parallel.errors import DamagedCheckpointError, UserError
from parallel.mesh import ParallelLayout
from parallel.object_collectives import on_first_rank
from parallel.process_group import launched_rank, launched_world_size
from parallel.whole_files import whole_directory


def finetune(settings: FinetuneSettings, *, ends_process: bool = False) -> str | None:
    """Train as the settings say, with one seed or several, resuming where an earlier run stopped.

    Args:
        ends_process: whether the process ends after this; see :class:`StopRequest`.

    Returns:
        Why the run stopped before its end; None if it is done.

    Raises:
        UserError: settings, files or world size do not fit; found before any process group starts where possible.
    """
    return run_all(settings, seed_variants(settings), FinetuneProcedure(), ends_process=ends_process)


class FinetuneProcedure(Procedure):
    """Fine-tuning leaves the model of the best checkpoint and what it scores; quantization does more."""

    #: What is trained.
    objective: ClassVar[type[Finetuning]] = Finetuning

    def check(self, settings: FinetuneSettings, start: Start) -> None:
        """Before anything is written: what a run needs in its directory to go on.

        Raises:
            UserError: it is not there.
        """

    def begin(self, trainer: Trainer, report: Report) -> None:  # noqa: ARG002
        """Remove the results of an earlier run, if one begins in its place."""
        if trainer.world.is_first:
            (trainer.settings.training.run_dir / RESULTS_FILE).unlink(missing_ok=True)

    def draw(self, run_dir: Path, objective: Objective) -> object:
        """Losses and the held-out score."""
        return draw_run(run_dir, objective.metric)

    def finish(self, trainer: Trainer, report: Report) -> dict[str, Any]:
        """Score the best checkpoint on every split, and write what a run leaves behind; every rank calls."""
        checkpoint = self.take_best(trainer, report)
        splits = score_splits(trainer)
        return on_first_rank(lambda: self.leave(trainer, report, checkpoint, splits))

    def take_best(self, trainer: Trainer, report: Report) -> Path:
        """Load the weights of the best checkpoint, or of the last one if that cannot be read; its path."""
        best, last = trainer.selection.best_step or trainer.step, trainer.step
        checkpoints = {step: trainer.checkpoints.root / f"step_{step:08d}" for step in (best, last)}
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
        self, trainer: Trainer, report: Report, checkpoint: Path, splits: Mapping[str, SplitResult]
    ) -> dict[str, Any]:
        """Write the model and, last of all, the results, which say that the run is finished; rank 0 calls."""
        settings, objective = cast(FinetuneSettings, trainer.settings), cast(Finetuning, trainer.objective)
        run_dir, (task, splits) = settings.training.run_dir, settled(objective.task, splits)
        with whole_directory(run_dir / MODEL_FOLDER) as directory:
            save_task(checkpoint, objective.config, task, directory, self.computed_in(settings))
        step = checkpoint_step(checkpoint) or 0
        results = write_results(
            run_dir,
            settings,
            task,
            splits,
            step=step,
            steps=trainer.step,
            beside=self.scores_beside(),
            class_weights=objective.weight_of_class,
        )
        for split, found in results["splits"].items():
            scores = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
            report.say(f"{split}: {scores or 'not labeled; see the predictions'}")
        report.say(f"the model of step {step}, predictions and {RESULTS_FILE} are in {run_dir}")
        return results

    def computed_in(self, settings: FinetuneSettings) -> torch.dtype:  # noqa: ARG002
        """The number format that saved weights are rounded to: none, so that of the checkpoints."""
        return torch.float32

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
    procedure: FinetuneProcedure,
    *,
    ends_process: bool = False,
) -> str | None:
    """Run the variants of a command one after the other, in one world; why one stopped before its end, or None.

    Args:
        variants: by directory below the command's.
        ends_process: as for :func:`finetune`.

    Raises:
        UserError: settings, files or world size do not fit.
    """
    layout = check_layout(settings, launched_world_size())
    if is_spare(layout):
        return None
    with checked_runs(settings, variants, procedure, layout) as checked:
        return _run_checked(checked, settings, variants, procedure, layout, ends_process=ends_process)


class CheckedRuns(NamedTuple):
    """The runs of a command, of which nothing is written yet.

    Attributes:
        done: results of each variant; None for one that is to run.
        objectives: of the variants that are to run.
    """

    data: TaskInstances
    done: dict[str, dict[str, Any] | None]
    objectives: dict[str, Finetuning]


@contextmanager
def checked_runs(
    settings: FinetuneSettings,
    variants: Mapping[str, FinetuneSettings],
    procedure: FinetuneProcedure,
    layout: ParallelLayout,
) -> Iterator[CheckedRuns]:
    """Open the model and read the data; what can be wrong with the runs of a command is found before anything starts.

    Args:
        variants: by directory below the command's.

    Raises:
        UserError: model, tokenizer, data, layout and settings do not go together.
    """
    if len(variants) > 1 and settings.checkpoint.resume not in ("auto", "none"):
        raise UserError(
            f"checkpoint.resume is {settings.checkpoint.resume}, but there are {len(variants)} runs: give auto or "
            "none, or a single seed"
        )
    tokenizer = find_tokenizer(settings)
    with open_checkpoint(settings.model.from_) as source:  # once, for all of the runs
        encoder = encoder_config(settings, tokenizer, source)
        check_tensor_size(layout.tensor, encoder)
        form = input_format(tokenizer, roberta=encoder.like_roberta)
        data = TaskInstances(build_task(settings.task, settings.data, tokenizer, form))
        check_lengths(data.task.max_length, form, encoder)
        done = {name: finished(variant, data.task) for name, variant in variants.items()}
        objectives: dict[str, Finetuning] = {}
        if done.get("") is None:
            for split in data.task.splits:
                data.task.examples(split)  # what cannot be read is found before anything is trained
        for name in (name for name, results in done.items() if results is None):
            variant = variants[name]
            config = task_config(encoder_config(variant, tokenizer, source), data.task)
            objective = procedure.objective(variant, config, data, variant.training.seed, source)
            objectives[name] = _prepare(variant, procedure, objective)
        yield CheckedRuns(data, done, objectives)


def _run_checked(
    checked: CheckedRuns,
    settings: FinetuneSettings,
    variants: Mapping[str, FinetuneSettings],
    procedure: FinetuneProcedure,
    layout: ParallelLayout,
    *,
    ends_process: bool,
) -> str | None:
    training, done, objectives = settings.training, checked.done, checked.objectives
    if done.get("") is not None:
        if launched_rank() == 0:
            print(f"{training.run_dir / RESULTS_FILE} is there: nothing left to do; remove it to train on")
        return None
    with opened(settings, layout, ends_process=ends_process) as command:
        if "" not in variants:
            on_first_rank(lambda: write_start(settings))
        found: dict[str, dict[str, Any]] = {}
        for name, variant in variants.items():
            results: dict[str, Any] | Stopped | None = done[name]
            if results is None:
                with _owning_below(command.lock, variant) as own:
                    results = train(command, variant, objectives.pop(name), procedure, own)
            if isinstance(results, Stopped):
                return results.reason
            found[name] = results
        if "" not in found:
            on_first_rank(lambda: summarize(training.run_dir, found, checked.data.task))
    return None


def _owning_below(lock: RunLock, variant: FinetuneSettings) -> AbstractContextManager[RunLock]:
    """The lock of one of several runs' directory, in which a command of its own may train; or the command's lock."""
    run_dir = variant.training.run_dir
    if run_dir == lock.run_dir:
        return nullcontext(lock)
    return owning(run_dir, variant.parallel.timeout_seconds)


def _prepare(settings: FinetuneSettings, procedure: FinetuneProcedure, objective: Finetuning) -> Finetuning:
    """Check what can be wrong with a run before anything of it is written; returns the objective."""
    if objective.total_steps > 0:
        check_learning_rate(settings.learning_rate, objective.total_steps)
    start = find_start(settings, objective)
    procedure.check(settings, start)
    model = settings.training.run_dir / MODEL_FOLDER
    if start.checkpoint is None and model.exists():
        raise UserError(
            f"{model} is of an earlier run, of which no checkpoint is there to go on from: remove it to train in this "
            "directory, or set another training.run_dir"
        )
    return objective
