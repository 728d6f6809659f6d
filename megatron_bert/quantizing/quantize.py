"""`megatron-bert quantize`: from a fine-tuned model to an integer one and what that costs."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from typing import Any, cast

import torch.distributed as dist

from megatron_bert.finetuning.finetune import FinetuneStage, report_results, run_all, score_splits, seed_variants
from megatron_bert.finetuning.results import write_json, write_results
from megatron_bert.finetuning.saved import save_task
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.finetuning.start import MODEL_FOLDER
from megatron_bert.ibert import as_table, plot
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.quantizing.objective import QuantizationAware, evaluating, freeze
from megatron_bert.quantizing.settings import QuantizeSettings
from megatron_bert.tasks.task import Task
from megatron_bert.training.metrics import Report
from megatron_bert.training.trainer import Trainer
from parallel.checkpoint import checkpoint_step
from parallel.errors import UserError

#: Scores of the float model and of the calibrated one, in a run directory from before its first step.
BASELINE_FILE = "before_training.json"
REPORT_NAME = "quantization_report"


def quantize(settings: QuantizeSettings, *, ends_process: bool = False) -> str | None:
    """Calibrate, train with quantisation, evaluate and save, resuming where an earlier run stopped.

    Args:
        settings: of the run.
        ends_process: whether the process ends after this; see :class:`~megatron_bert.training.signals.StopRequest`.

    Returns:
        Why the run stopped before its end; None if it is done.

    Raises:
        UserError: settings, files or world size do not fit.
    """
    if settings.training.compile:
        raise UserError("quantised layers are not compiled: set training.compile=false")
    if settings.precision.compute == "float16":
        raise UserError("quantisation trains in float32 or bfloat16: set precision.compute to one of them")
    settings.quantization.config()
    variants = {
        "_".join(filter(None, (seed, combination))): variant
        for seed, of_seed in seed_variants(settings).items()
        for combination, variant in _combinations(of_seed).items()
    }
    return run_all(settings, variants, QuantizeStage(), ends_process=ends_process)


def _combinations(settings: QuantizeSettings) -> dict[str, QuantizeSettings]:
    """Name of a combination's directory -> settings of its run; one without a name where nothing is searched."""
    search = settings.search
    if not search.enabled:
        return {"": settings}
    variants = {}
    for rate, attention, hidden in itertools.product(
        search.learning_rate, search.attention_probs_dropout_prob, search.hidden_dropout_prob
    ):
        name = f"rate_{rate:g}_attention_{attention:g}_hidden_{hidden:g}"
        chances = {"attention_probs_dropout_prob": attention, "hidden_dropout_prob": hidden}
        changes: dict[str, Any] = {
            "model": settings.model.model_copy(update=chances),
            "learning_rate": settings.learning_rate.model_copy(update={"peak": rate}),
            "training": settings.training.model_copy(update={"run_dir": settings.training.run_dir / name}),
            "search": search.model_copy(update={"enabled": False}),
        }
        variants[name] = settings.model_copy(update=changes)
    return variants


class QuantizeStage(FinetuneStage):
    """Scores before training, ranges that are fixed after it, and the report."""

    def objective(
        self, settings: FinetuneSettings, config: MegatronBertConfig, task: Task, seed: int
    ) -> QuantizationAware:
        """Training in integers."""
        return QuantizationAware(cast(QuantizeSettings, settings), config, task, seed)

    def begin(self, settings: FinetuneSettings, trainer: Trainer, report: Report) -> None:
        """Score the float model, calibrate, and score what came out; a run that goes on has done so."""
        objective = cast(QuantizationAware, trainer.objective)
        if cast(QuantizeSettings, settings).distillation.weight > 0.0:
            objective.add_teacher(trainer.model, trainer.evaluation_engine, trainer.world.device)
        path = settings.training.run_dir / BASELINE_FILE
        if trainer.step > 0 and path.is_file():
            return
        before: dict[str, dict[str, float]] = {}
        with evaluating(trainer.model, floating=True):
            before |= {f"{split}_float": found.scores for split, found in score_splits(trainer).items()}
        objective.calibrate(trainer.model, trainer.evaluation_engine, trainer.mesh)
        before |= {f"{split}_calibrated": found.scores for split, found in score_splits(trainer).items()}
        for split, scores in before.items():
            report.say(f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        if trainer.world.is_first:
            write_json(path, before)
        dist.barrier()
        if objective.total_steps == 0:
            trainer.save()
            trainer.checkpoints.finish()

    def finish(self, settings: FinetuneSettings, trainer: Trainer, report: Report) -> None:
        """Fix the ranges, score, compare every tensor with the float model, and save; every rank calls."""
        run_dir, objective = settings.training.run_dir, cast(QuantizationAware, trainer.objective)
        checkpoint = self.take_best(settings, trainer)
        freeze(trainer.model)
        splits = score_splits(trainer)
        rows = objective.report(trainer.model, trainer.evaluation_engine, trainer.mesh)
        if not trainer.world.is_first:
            return
        before = json.loads((run_dir / BASELINE_FILE).read_text(encoding="utf-8"))
        step = checkpoint_step(checkpoint) or 0
        task = write_results(run_dir, settings, objective.task, splits, step=step, steps=trainer.step, beside=before)
        config = cast(QuantizeSettings, settings).quantization.config()
        save_task(checkpoint, objective.config, task, run_dir / MODEL_FOLDER, config)
        write_json(run_dir / f"{REPORT_NAME}.json", {"tensors": [asdict(row) for row in rows]})
        (run_dir / f"{REPORT_NAME}.txt").write_text(as_table(rows) + "\n", encoding="utf-8")
        plot(rows, run_dir / f"{REPORT_NAME}.png")
        report_results(settings, trainer, report)
