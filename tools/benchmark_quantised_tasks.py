"""Scores of float, calibrated and quantisation-aware models on tasks, over several seeds.

For each settings file of `megatron-bert finetune` and each seed:

1. ``float``: the model is fine-tuned;
2. ``further``: it is trained on in floating point, for as long and as the quantised models are, so that what further
   training alone is worth is not put down to quantisation;
3. ``wN calibrated`` and ``wN trained``: weights of N bits and activations of 8, before and after that training.

Every training keeps its best step on the validation split; test splits decide nothing. Runs that are finished are not
run again, so the same command, also with other files, goes on where it was::

    python -m tools.benchmark_quantised_tasks configs/finetune/classification.yaml --runs runs/quantised
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch

from megatron_bert.config_file import load_sections
from megatron_bert.finetuning.finetune import finetune
from megatron_bert.finetuning.results import read_results
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.quantizing.quantize import quantize
from megatron_bert.quantizing.settings import QuantizeSettings
from tools.benchmark_throughput import processor_name

matplotlib.use("Agg")

#: Splits that results.json has for other models than the one that is saved.
_CALIBRATED = "_calibrated"


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


def score_seed(file: Path, seed: int, directory: Path, arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The task's metric, and its value by model and split."""
    seeded = [f"training.seed={seed}", "training.seeds=null"]
    first = finished_run(finetune, FinetuneSettings, file, directory / "float", seeded)
    metric = first["metric"]
    after = [
        *seeded,
        f"model.from={directory / 'float'}",
        "model.keep_head=true",
        f"training.epochs={arguments.epochs}",
        f"learning_rate.peak={arguments.rate}",
        *arguments.change,
    ]
    scores = {"float": first["splits"]}
    scores["further"] = finished_run(finetune, FinetuneSettings, file, directory / "further", after)["splits"]
    for bits in arguments.weight_bits:
        name = f"w{bits}"
        quantised = [*after, f"quantization.weight_bits={bits}", *arguments.quantised_change]
        splits = finished_run(quantize, QuantizeSettings, file, directory / name, quantised)["splits"]
        before = {split: splits[split + _CALIBRATED] for split in first["splits"]}
        scores |= {f"{name} calibrated": before, f"{name} trained": {split: splits[split] for split in first["splits"]}}
    return metric, {
        model: {split: found[metric] for split, found in splits.items() if metric in found}
        for model, splits in scores.items()
    }


def summarise(seeds: dict[int, dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Split -> model -> every seed's score in turn, and their median."""
    some = next(iter(seeds.values()))
    return {
        split: {
            model: {
                "seeds": (values := [scores[model][split] for scores in seeds.values()]),
                "median": statistics.median(values),
            }
            for model in some
        }
        for split in some["float"]
    }


def draw(tasks: dict[str, Any], path: Path) -> None:
    """Medians as bars and seeds as dots, a panel for each task's last split."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(tasks), figsize=(3.2 * len(tasks), 3.6), squeeze=False)
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
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Run what is missing, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="settings of fine-tuning, one file a task")
    parser.add_argument("--runs", type=Path, required=True, help="directory for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--weight-bits", type=int, nargs="+", default=[8, 7], choices=(7, 8))
    parser.add_argument("--epochs", type=float, default=2.0, help="of the training that follows fine-tuning")
    parser.add_argument("--rate", type=float, default=3e-5, help="its peak learning rate")
    parser.add_argument("--change", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="of that training")
    parser.add_argument(
        "--quantised-change", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="of the quantised models' alone"
    )
    parser.add_argument("--about", default="", help="what was measured, in words, for the JSON file")
    parser.add_argument("--output", type=Path, help="JSON file to write; a picture goes beside it")
    arguments = parser.parse_args()
    tasks: dict[str, Any] = {}
    for file in arguments.files:
        found, metric = {}, ""
        for seed in arguments.seeds:
            metric, found[seed] = score_seed(file, seed, arguments.runs / file.stem / f"seed_{seed}", arguments)
        tasks[file.stem] = {
            "metric": metric,
            "settings": load_sections(file, [], FinetuneSettings).model_dump(
                mode="json", by_alias=True, exclude_unset=True, exclude={"model": {"from_"}, "data": True}
            ),
            "splits": summarise(found),
        }
        for split, models in tasks[file.stem]["splits"].items():
            line = ", ".join(f"{model} {scores['median']:.4f}" for model, scores in models.items())
            print(f"{file.stem} {split} {metric}: {line}", flush=True)
    if arguments.output is None:
        return
    result = {
        "about": arguments.about,
        "command": "python -m tools.benchmark_quantised_tasks " + " ".join(sys.argv[1:]),
        "machine": processor_name(),
        "torch": torch.__version__,
        "seeds": arguments.seeds,
        "training that follows": {
            "epochs": arguments.epochs,
            "learning_rate.peak": arguments.rate,
            "changes": arguments.change,
            "changes of quantised models": arguments.quantised_change,
        },
        "tasks": tasks,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(tasks, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
