# SPDX-License-Identifier: Apache-2.0
"""Scores of float, calibrated and quantization-aware models on tasks, over several seeds.

For each settings file of `megatron-bert finetune` and each seed:

1. ``float``: the model is fine-tuned;
2. ``further``: it is trained on in floating point, for as long and as the quantized models are, so that what further
   training alone is worth is not put down to quantization;
3. ``wN calibrated`` and ``wN trained``: weights of N bits and activations of 8, before and after that training.

Every training keeps its best step on the validation split; test splits decide nothing. Runs that are finished are not
run again, so the same command, also with other files, goes on where it was::

    python -m benchmarks.quantized_tasks configs/finetune/classification.yaml --runs runs/quantized
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.harness import provenance
from megatron_bert.ending import command
from megatron_bert.finetuning.finetune import finetune
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.quantizing.quantize import quantize
from megatron_bert.quantizing.settings import QuantizeSettings
from parallel.process_group import choose_device
from tools.task_scores import add_task_options, essential_settings, finished_run, measured, summarize, write_report

#: Splits that results.json has for other models than the one that is saved.
_CALIBRATED = "_calibrated"


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
        quantized = [*after, f"quantization.weight_bits={bits}", *arguments.quantized_change]
        splits = finished_run(quantize, QuantizeSettings, file, directory / name, quantized)["splits"]
        before = {split: splits[split + _CALIBRATED] for split in first["splits"]}
        scores |= {f"{name} calibrated": before, f"{name} trained": {split: splits[split] for split in first["splits"]}}
    return metric, {
        model: {split: found[metric] for split, found in splits.items() if metric in found}
        for model, splits in scores.items()
    }


def measure(file: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One task: its metric, settings and scores."""
    found, metric = {}, ""
    for seed in arguments.seeds:
        metric, found[seed] = score_seed(file, seed, arguments.runs / file.stem / f"seed_{seed}", arguments)
    return {"metric": metric, "settings": essential_settings(file), "splits": summarize(found)}


@command("benchmarks.quantized_tasks")
def main() -> None:
    """Run what is missing, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_options(parser)
    parser.add_argument("--weight-bits", type=int, nargs="+", default=[8, 7], choices=(7, 8))
    parser.add_argument("--epochs", type=float, default=2.0, help="of the training that follows fine-tuning")
    parser.add_argument("--rate", type=float, default=3e-5, help="its peak learning rate")
    parser.add_argument("--change", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="of that training")
    parser.add_argument(
        "--quantized-change", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="of the quantized models' alone"
    )
    arguments = parser.parse_args()
    made = {
        **provenance("quantized_tasks", device=choose_device("auto", 0)),
        "seeds": arguments.seeds,
        "training that follows": {
            "epochs": arguments.epochs,
            "learning_rate.peak": arguments.rate,
            "changes": arguments.change,
            "changes of quantized models": arguments.quantized_change,
        },
    }
    write_report(arguments, measured(arguments.files, lambda file: measure(file, arguments)), made)


if __name__ == "__main__":
    main()
