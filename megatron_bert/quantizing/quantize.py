# SPDX-License-Identifier: Apache-2.0
"""`megatron-bert quantize`: from a fine-tuned model to an integer one and what that costs."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from megatron_bert.finetuning.finetune import FinetuneProcedure, run_all, score_splits, seed_variants
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.ibert import QuantizerReport, as_table, plot
from megatron_bert.json_file import read_object
from megatron_bert.quantizing.objective import QuantizationAware, evaluating, freeze
from megatron_bert.quantizing.settings import QuantizeSettings, check_quantize
from megatron_bert.training.metrics import Report
from megatron_bert.training.precision import DTYPES
from megatron_bert.training.run import Start
from megatron_bert.training.trainer import Trainer
from parallel.errors import UserError
from parallel.object_collectives import on_first_rank
from parallel.whole_files import write_json, write_text

#: Scores of the float model and of the calibrated one, in a run directory from before its first step.
BASELINE_FILE = "before_training.json"
REPORT_NAME = "quantization_report"


def quantize(settings: QuantizeSettings, *, ends_process: bool = False) -> str | None:
    """Calibrate, train with quantization, evaluate and save, resuming where an earlier run stopped.

    Args:
        ends_process: whether the process ends after this; see :class:`~megatron_bert.training.signals.StopRequest`.

    Returns:
        Why the run stopped before its end; None if it is done.

    Raises:
        UserError: settings, files or world size do not fit.
    """
    check_quantize(settings)
    return run_all(settings, quantize_variants(settings), QuantizeProcedure(), ends_process=ends_process)


def quantize_variants(settings: QuantizeSettings) -> dict[str, QuantizeSettings]:
    """Name of a run's directory -> its settings, for each combination and seed; one without a name if there is one."""
    return {
        "/".join(filter(None, (combination, seed))): variant
        for combination, of_combination in _combinations(settings).items()
        for seed, variant in seed_variants(of_combination).items()
    }


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


class QuantizeProcedure(FinetuneProcedure):
    """Scores before training, ranges that are fixed after it, and the report."""

    objective = QuantizationAware

    def __init__(self) -> None:
        #: Of the float and of the calibrated model, in the run that is trained.
        self._before: dict[str, dict[str, float]] = {}

    def check(self, settings: FinetuneSettings, start: Start) -> None:
        """The scores from before the first step must be there."""
        path = settings.training.run_dir / BASELINE_FILE
        if start.checkpoint is not None and not path.is_file():
            raise UserError(
                f"{path} is missing, which the run wrote before its first step: quantization goes on in its own "
                "training.run_dir only"
            )

    def begin(self, trainer: Trainer, report: Report) -> None:
        """Score the float model, calibrate, and score what came out; a run that goes on has done so."""
        super().begin(trainer, report)
        objective = cast(QuantizationAware, trainer.objective)
        if objective.distillation.weight > 0.0:
            objective.add_teacher(trainer.model, trainer.evaluation_engine, trainer.world.device)
        path = trainer.settings.training.run_dir / BASELINE_FILE
        if trainer.step > 0:
            self._before = on_first_rank(lambda: _read_scores(path))
            return
        before: dict[str, dict[str, float]] = {}
        with evaluating(trainer.model, floating=True):
            before |= {f"{split}_float": found.scores for split, found in score_splits(trainer).items()}
        objective.calibrate(trainer.model, trainer.evaluation_engine, trainer.mesh)
        before |= {f"{split}_calibrated": found.scores for split, found in score_splits(trainer).items()}
        for split, scores in before.items():
            report.say(f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        on_first_rank(lambda: write_json(path, before))
        self._before = before
        if objective.total_steps == 0:
            trainer.save()
            trainer.checkpoints.finish()

    def finish(self, trainer: Trainer, report: Report) -> dict[str, Any]:
        """Fix the ranges, score, compare every tensor with the float model, and save; every rank calls."""
        objective = cast(QuantizationAware, trainer.objective)
        checkpoint = self.take_best(trainer, report)
        freeze(trainer.model)
        splits = score_splits(trainer)
        rows = objective.report(trainer.model, trainer.evaluation_engine, trainer.mesh)

        def leave() -> dict[str, Any]:
            _write_report(trainer.settings.training.run_dir / REPORT_NAME, rows)
            return self.leave(trainer, report, checkpoint, splits)

        return on_first_rank(leave)

    def computed_in(self, settings: FinetuneSettings) -> torch.dtype:
        """That of matrix products, so that what is saved has the integers that were trained and scored."""
        return DTYPES[settings.precision.compute]

    def scores_beside(self) -> dict[str, dict[str, float]]:
        """Those of the float and of the calibrated model."""
        return self._before


def _read_scores(path: Path) -> dict[str, dict[str, float]]:
    scores = read_object(path, "put back a copy of it, or start in a new training.run_dir")
    if not all(isinstance(values, dict) for values in scores.values()):
        raise UserError(f"{path} does not hold scores by split: put back a copy, or start in a new training.run_dir")
    return scores


def _write_report(path: Path, rows: list[QuantizerReport]) -> None:
    write_json(path.with_suffix(".json"), {"tensors": [asdict(row) for row in rows]})
    write_text(path.with_suffix(".txt"), as_table(rows) + "\n")
    plot(rows, path.with_suffix(".png"))
