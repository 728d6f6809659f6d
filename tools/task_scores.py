# SPDX-License-Identifier: Apache-2.0
"""Runs of fine-tuning for benchmarks, and scores of several models on several tasks as medians and as a picture."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_bert.config_file import load_sections
from megatron_bert.finetuning.results import read_results
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.finetuning.start import encoder_config, find_tokenizer
from megatron_bert.tasks.encoding import input_format
from megatron_bert.tasks.registry import build_task
from megatron_bert.tasks.task import Task
from parallel.whole_files import write_json, write_picture


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Arguments of a benchmark of tasks."""
    parser.add_argument("files", type=Path, nargs="+", help="settings of fine-tuning, one file a task")
    parser.add_argument("--runs", type=Path, required=True, help="directory for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--about", default="", help="what was measured, in words, for the JSON file")
    parser.add_argument("--output", type=Path, help="JSON file to write; a picture goes beside it")


def measured(files: list[Path], measure: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What is measured of the task of each settings file, said as it is found."""
    tasks = {}
    for file in files:
        tasks[file.stem] = measure(file)
        print(describe(file.stem, tasks[file.stem]), flush=True)
    return tasks


def write_report(arguments: argparse.Namespace, tasks: dict[str, Any], made: Mapping[str, Any]) -> None:
    """Write what was measured, how it was made, and a picture of it, where that is asked for."""
    if arguments.output is not None:
        write_json(arguments.output, {"about": arguments.about, **made, "tasks": tasks})
        draw(tasks, arguments.output.with_suffix(".png"))


def finished_run(
    run: Callable[[Any], str | None], kind: type[FinetuneSettings], file: Path, directory: Path, changes: list[str]
) -> dict[str, Any]:
    """Results of a run with a settings file and changes to it, which is run unless it is finished."""
    results = read_results(directory)
    if results is None:
        stopped = run(load_sections(file, [*changes, f"training.run_dir={directory}"], kind))
        if stopped is not None:
            raise SystemExit(f"{directory} was stopped by {stopped}: the same command goes on from there")
        results = read_results(directory)
    assert results is not None, "a run that was not stopped is finished"
    return results


def task_of_file(file: Path) -> Task[Any, Any]:
    """The task of a settings file, as fine-tuning reads it."""
    settings = load_sections(file, [], FinetuneSettings)
    tokenizer = find_tokenizer(settings)
    form = input_format(tokenizer, roberta=encoder_config(settings, tokenizer).like_roberta)
    return build_task(settings.task, settings.data, tokenizer, form)


def essential_settings(file: Path) -> dict[str, Any]:
    """What a settings file sets, without where its data, its model and its runs are."""
    return load_sections(file, [], FinetuneSettings).model_dump(
        mode="json",
        by_alias=True,
        exclude_unset=True,
        exclude={"model": {"from_"}, "data": True, "training": {"run_dir"}},
    )


def summarize(seeds: Mapping[int, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Split -> model -> the score of every seed it was run with, in turn, and their median.

    Args:
        seeds: seed -> model -> split -> score.
    """
    splits: dict[str, dict[str, dict[str, Any]]] = {}
    for models in seeds.values():
        for model, scores in models.items():
            for split, score in scores.items():
                splits.setdefault(split, {}).setdefault(model, {"seeds": []})["seeds"].append(score)
    for found in splits.values():
        for entry in found.values():
            entry["median"] = statistics.median(entry["seeds"])
    return splits


def describe(name: str, task: Mapping[str, Any]) -> str:
    """A line for each split: the medians."""
    return "\n".join(
        f"{name} {split} {task['metric']}: "
        + ", ".join(f"{model} {scores['median']:.4f}" for model, scores in models.items())
        for split, models in task["splits"].items()
    )


def draw(tasks: dict[str, Any], path: Path) -> None:
    """Medians as bars and seeds as dots, a panel for each task's last split."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(tasks), 3.6))
    axes = figure.subplots(1, len(tasks), squeeze=False)
    for axis, (name, task) in zip(axes[0], tasks.items()):
        split, models = list(task["splits"].items())[-1]
        places = range(len(models))
        axis.bar(places, [model["median"] for model in models.values()], color="0.8")
        for place, model in zip(places, models.values()):
            axis.plot([place] * len(model["seeds"]), model["seeds"], "o", color="tab:blue", markersize=4)
        lowest = min(min(model["seeds"]) for model in models.values())
        highest = max(max(model["seeds"]) for model in models.values())
        room = (highest - lowest) or abs(highest) or 1.0
        axis.set_ylim(lowest - room if lowest < 0.0 else max(0.0, lowest - room), highest + room / 4)
        axis.set_xticks(places, list(models), rotation=60, ha="right")
        axis.set_title(f"{name}: {task['metric']}, {split}", fontsize=9)
    figure.tight_layout()
    write_picture(path, figure, dpi=120)
