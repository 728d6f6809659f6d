# SPDX-License-Identifier: Apache-2.0
"""What several runs of a command found together: spread over seeds, and which run is the best."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bert.finetuning.pictures import draw_runs
from megatron_bert.finetuning.results import RESULTS_FILE
from megatron_bert.tasks.task import Task
from parallel.whole_files import write_json

#: How the directories of seeds begin.
SEED = "seed_"


def summarize(run_dir: Path, found: Mapping[str, Mapping[str, Any]], task: Task) -> None:
    """Write ``results.json`` and ``runs.png`` of several runs, and say what is in them; rank 0 calls.

    Runs that differ in the seed alone make a group, with median and spread of every score. The best group has the
    highest median of the task's metric on the validation split that decides, and the best run the highest in it.

    Args:
        found: directory of each run below it -> its results.
    """
    runs = {name: dict(results["splits"]) for name, results in found.items()}
    groups: dict[str, list[str]] = {}
    for name in runs:
        groups.setdefault(name.rpartition(SEED)[0].rstrip("/"), []).append(name)
    spreads = {group: _spread([runs[name] for name in names]) for group, names in groups.items()}
    best = _best(groups, spreads, runs, task)
    summary: dict[str, Any] = {"metric": task.metric, "best": best, "runs": runs}
    if len(groups) == 1:
        summary["splits"] = next(iter(spreads.values()))
    else:
        summary["groups"] = spreads
    write_json(run_dir / RESULTS_FILE, summary)
    draw_runs(run_dir, task.metric, runs)
    for group, spread in spreads.items():
        for split, scores in spread.items():
            for name, value in scores.items():
                of = f"of {len(groups[group])} runs, {value['lowest']:.4f} to {value['highest']:.4f}"
                print(f"{group + ' ' if group else ''}{split} {name}: median {value['median']:.4f} {of}")
    if best is not None:
        print(f"best: {run_dir / best['name']} with {task.metric} {best['score']:.4f}")


def _spread(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Median, range and standard deviation of the scores that all runs have."""
    spread: dict[str, dict[str, dict[str, float]]] = {}
    for split in runs[0]:
        names = [name for name in runs[0][split] if all(name in run.get(split, ()) for run in runs)]
        for name in names:
            values = [run[split][name] for run in runs]
            spread.setdefault(split, {})[name] = {
                "median": statistics.median(values),
                "lowest": min(values),
                "highest": max(values),
                "standard_deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
            }
    return spread


def _best(
    groups: Mapping[str, list[str]],
    spreads: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]],
    runs: Mapping[str, Mapping[str, Mapping[str, float]]],
    task: Task,
) -> dict[str, Any] | None:
    """Name and score of the best run; None without validation data."""
    if not task.valid_splits:
        return None
    split, metric = task.valid_splits[0], task.metric
    group = max(groups, key=lambda name: spreads[name][split][metric]["median"])
    name = max(groups[group], key=lambda run: runs[run][split][metric])
    return {
        "name": name,
        "score": runs[name][split][metric],
        "median_of_group": spreads[group][split][metric]["median"],
    }
