# SPDX-License-Identifier: Apache-2.0
"""Scores of fine-tuning on tasks beside transformers' Trainer and beside the best constant answer.

For each settings file of `megatron-bert finetune` and each seed, the model is fine-tuned here, and with
``--their-seeds`` by transformers' Trainer, from the same weights with the same settings. Both keep the epoch that is
best on the validation split. What is finished is not run again, so the same command, also with other files, goes on
where it was. Transformers' part needs the packages ``transformers`` and ``accelerate``::

    python -m benchmarks.finetuning configs/finetune/classification.yaml --runs runs/tasks --their-seeds 1 2 3
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import provenance
from megatron_bert.config_file import load_sections
from megatron_bert.ending import command
from megatron_bert.finetuning.finetune import finetune
from megatron_bert.finetuning.results import read_results
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.tasks.squad_metrics import token_f1
from megatron_bert.tasks.task import IGNORED, Task
from parallel.process_group import choose_device
from parallel.whole_files import write_json
from tools.task_scores import (
    add_task_options,
    essential_settings,
    finished_run,
    measured,
    summarize,
    task_of_file,
    write_report,
)

#: What transformers' Trainer reached for a seed, beside the run.
_THEIR_SCORES = "transformers.json"
#: Of a text, the first so many words are what a constant answer to questions may be.
_WORDS = (1, 2, 3, 5, 8, 12, 16, 20, 24, 30, 40)


def constant_answer(task: Task[Any, Any], split: str) -> float:
    """The task's metric where every answer is the one that is most frequent, or best, in the training data."""
    training, examples = task.examples("train"), task.examples(split)
    if task.head.kind == "span":
        return 100.0 * max((_first_words(training, words), _first_words(examples, words)) for words in _WORDS)[1]
    known = [instance.label for instance in task.instances(training, train=True)]
    labels = np.concatenate(known) if task.head.kind == "token" else np.stack(known)
    instances = task.instances(examples, train=False)
    if np.issubdtype(labels.dtype, np.floating):
        # The mean of a number; of labels that may be true together, those that more often are than not.
        mean = np.nanmean(labels, axis=0)
        answer = mean if task.head.problem == "regression" else mean - 0.5
    else:
        widest = (
            max(len(instance.features) for instance in instances) if task.head.kind == "choice" else task.head.outputs
        )
        answer = np.arange(widest) == np.bincount(labels[labels != IGNORED]).argmax()
    answer = answer.astype(np.float32)
    logits = []
    for instance in instances:
        if task.head.kind == "token":
            logits.append(np.tile(answer, (len(instance.features[0].rows), 1)))
        else:
            logits.append(answer[: len(instance.features)] if task.head.kind == "choice" else answer)
    return task.metrics(examples, task.predictions(examples, instances, logits))[task.metric]


def _first_words(examples: list[Any], words: int) -> float:
    """Mean F1 of the first words of the texts as answers."""
    found = [
        max(token_f1(gold.text, " ".join(example.context.split()[:words]), no_answer=False) for gold in example.answers)
        for example in examples
    ]
    return float(np.mean(found))


def their_scores(file: Path, seed: int, directory: Path) -> dict[str, dict[str, float]]:
    """Scores of transformers' Trainer by split, from ``directory`` if they are there."""
    kept = directory / _THEIR_SCORES
    if not kept.exists():
        from benchmarks.transformers_trainer import train

        settings = load_sections(file, [f"training.run_dir={directory}"], FinetuneSettings)
        with tempfile.TemporaryDirectory() as folder:
            scores, seconds = train(settings, seed, Path(folder))
        write_json(kept, {"scores": scores, "training_seconds": seconds})
    found: dict[str, dict[str, float]] = json.loads(kept.read_text(encoding="utf-8"))["scores"]
    return found


def measure(file: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One task: its metric, settings and scores."""
    task = task_of_file(file)
    found: dict[int, dict[str, dict[str, float]]] = {}
    for seed in arguments.seeds:
        directory = arguments.runs / file.stem / f"seed_{seed}"
        if arguments.finished and read_results(directory / "float") is None:
            continue
        changes = [f"training.seed={seed}", "training.seeds=null"]
        splits = finished_run(finetune, FinetuneSettings, file, directory / "float", changes)["splits"]
        models = {"megatron_bert": splits}
        if (directory / _THEIR_SCORES).exists() if arguments.finished else seed in arguments.their_seeds:
            models["transformers"] = their_scores(file, seed, directory)
        if not found:
            models["constant answer"] = {split: {task.metric: constant_answer(task, split)} for split in splits}
        found[seed] = {
            model: {split: scores[task.metric] for split, scores in by_split.items() if task.metric in scores}
            for model, by_split in models.items()
        }
    return {"metric": task.metric, "settings": essential_settings(file), "splits": summarize(found)}


@command("benchmarks.finetuning")
def main() -> None:
    """Run what is missing, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_options(parser)
    parser.add_argument("--their-seeds", type=int, nargs="*", default=[], help="those for transformers' Trainer too")
    parser.add_argument("--finished", action="store_true", help="report what there is of the seeds, and run nothing")
    arguments = parser.parse_args()
    tasks = measured(arguments.files, lambda file: measure(file, arguments))
    theirs = any("transformers" in models for task in tasks.values() for models in task["splits"].values())
    packages = ("transformers", "accelerate") if theirs else ()
    write_report(arguments, tasks, provenance("finetuning", *packages, device=choose_device("auto", 0)))


if __name__ == "__main__":
    main()
