# SPDX-License-Identifier: Apache-2.0
"""What a fine-tuning run leaves behind beside the model: scores, predictions, files to submit."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_bert.convert.run_models import RESULTS_FILE, read_results
from megatron_bert.finetuning.objective import SplitResult
from megatron_bert.finetuning.pictures import draw_confusion
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.tasks.task import Prediction, Task
from megatron_bert.training.resuming import flat_settings
from parallel.errors import UserError
from parallel.whole_files import whole_file, write_json

#: What answers a row of which the model gives no numbers.
_NOT_FINITE = "the model's scores are NaN or infinite: its weights are damaged, or far too large"


def as_line(prediction: Prediction) -> tuple[str, bool]:
    """A prediction as a line of JSON, and whether it is one: JSON has no NaN and no infinity, so an error is in place.

    Args:
        prediction: with its ``id``.
    """
    try:
        return json.dumps(prediction, ensure_ascii=False, allow_nan=False) + "\n", True
    except ValueError:
        return json.dumps({"id": prediction.get("id"), "error": _NOT_FINITE}, ensure_ascii=False) + "\n", False


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """One JSON object per line."""
    with whole_file(path) as file:
        for prediction in predictions:
            file.write(as_line(prediction)[0])


def write_split(
    directory: Path, task: Task, split: str, examples: list[Any], predictions: list[Prediction]
) -> list[str]:
    """Write a split's predictions beside its examples, files to submit and a confusion matrix; the files' names."""
    path = directory / f"predictions_{split}.jsonl"
    shown = (task.shown(example) for example in examples)
    write_predictions(path, ({"id": p["id"], **beside, **p} for p, beside in zip(predictions, shown, strict=True)))
    paths = [path]
    submission = directory / f"submission_{split}"
    submission.mkdir(exist_ok=True)
    submitted = task.write_submission(examples, predictions, submission)
    paths += submitted
    if not submitted:
        submission.rmdir()
    if (confusion := task.confusion(examples, predictions)) is not None:
        paths.append(draw_confusion(directory / f"confusion_{split}.png", *confusion))
    return [str(path.relative_to(directory)) for path in paths]


def settled(task: Task, splits: Mapping[str, SplitResult]) -> tuple[Task, dict[str, SplitResult]]:
    """Choose on the first validation split what is to be chosen there (a threshold); rank 0 calls.

    Args:
        splits: what it says of each split, the validation split that decides first.

    Returns:
        The task with the choice, and what it says of each split: the same as before where there was nothing to choose.
    """
    first = next(iter(splits), "")
    chosen = task.calibrated(splits[first].examples, splits[first].predictions) if first.startswith("valid") else task
    if chosen is task:
        return task, dict(splits)
    return chosen, {split: _predicted_again(chosen, found) for split, found in splits.items()}


def _predicted_again(task: Task, found: SplitResult) -> SplitResult:
    """What a task makes of the logits of a split that another predicted."""
    predictions = task.predictions(found.examples, found.instances, found.logits)
    loss = {name: value for name, value in found.scores.items() if name == "loss"}
    return found._replace(predictions=predictions, scores=loss | task.metrics(found.examples, predictions))


def write_results(
    run_dir: Path,
    settings: FinetuneSettings,
    task: Task,
    splits: Mapping[str, SplitResult],
    *,
    step: int,
    steps: int,
    beside: Mapping[str, Mapping[str, float]] | None = None,
    class_weights: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Write predictions and, as the last file of a run, its results, which are returned; rank 0 calls.

    Args:
        task: of the run, settled.
        splits: what it says of each, the validation split that decides first.
        step: of the checkpoint that was scored.
        steps: taken in all.
        beside: scores of other models on the splits, by a name for both.
        class_weights: by label, in the loss of training; None where all counted alike.
    """
    files: list[str] = []
    for split, found in splits.items():
        files += write_split(run_dir, task, split, found.examples, found.predictions)
    packages = ("torch", "numpy", "scikit-learn", "scipy", "seqeval", "tokenizers")
    results = {
        "task": settings.task.name,
        "metric": task.metric,
        "best_step": step,
        "steps": steps,
        "splits": {split: found.scores for split, found in splits.items()} | dict(beside or {}),
        "files": files,
        **({} if class_weights is None else {"class_weights": dict(class_weights)}),
        "data": task.data_fingerprints(),
        "tokenizer": task.tokenizer.fingerprint,
        "settings": settings.as_json(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
    write_json(run_dir / RESULTS_FILE, results)
    return results


def finished(settings: FinetuneSettings, task: Task) -> dict[str, Any] | None:
    """The results of the run of these settings if it is finished; None if it is not.

    Raises:
        UserError: the run directory holds the results of other settings or data, or damaged ones.
    """
    run_dir = settings.training.run_dir
    try:
        results = read_results(run_dir)
    except ValueError as error:
        raise UserError(f"{run_dir / RESULTS_FILE} is damaged ({error}): remove it to train on") from None
    if results is None:
        return None
    if "settings" not in results:
        raise UserError(f"{run_dir} holds the summary of several runs: choose another training.run_dir")
    mine, theirs = flat_settings(settings.as_json()), flat_settings(results["settings"])
    different = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
    if different:
        name = different[0]
        raise UserError(
            f"{run_dir} holds the results of a run with {name} {theirs.get(name)!r}, but now it is {mine.get(name)!r}: "
            f"choose another training.run_dir, or remove {RESULTS_FILE} there"
        )
    before, now = (_contents(data) for data in (results.get("data", {}), task.data_fingerprints()))
    changed = next((path for path in now if before.get(path) != now[path]), None)
    if changed is not None:
        raise UserError(
            f"{run_dir} holds the results of a run with another content of {changed}: choose another "
            f"training.run_dir, or remove {RESULTS_FILE} there"
        )
    return results


def _contents(fingerprints: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, str]:
    """Path of a data file -> sha256."""
    return {entry["path"]: entry["sha256"] for entries in fingerprints.values() for entry in entries}
