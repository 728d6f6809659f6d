# SPDX-License-Identifier: Apache-2.0
"""Pictures of fine-tuning: curves of a run, confusion matrices, scores by seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bert.training.curves import plot_rows
from megatron_bert.training.metrics_file import METRICS_FILE, read_metrics, rows_with
from parallel.whole_files import write_picture

_BLUE, _ORANGE, _GREEN = "#4c78a8", "#f58518", "#54a24b"
#: Above as many classes, numbers in the cells of a confusion matrix could not be read.
_MOST_NUMBERS = 20


def draw_run(run_dir: Path, metric: str | None) -> Path | None:
    """Draw ``curves.png``, if there is anything to draw: losses on the left, the held-out score on the right.

    Args:
        metric: the score; None where there is no held-out data.
    """
    from matplotlib.figure import Figure

    rows = read_metrics(run_dir / METRICS_FILE)
    train = rows_with(rows, "loss")
    if not train:
        return None
    held_out = rows_with(rows, "valid_loss", *([] if metric is None else [f"valid_{metric}"]))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_rows(left, train, "loss", color=_BLUE, label="training")
    if held_out:
        plot_rows(left, held_out, "valid_loss", "o-", color=_ORANGE, markersize=4, label="held out")
    left.set(xlabel="step", ylabel="loss", title="Loss", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    if held_out and metric is not None:
        values = [row[f"valid_{metric}"] for row in held_out]
        plot_rows(right, held_out, f"valid_{metric}", "o-", color=_GREEN, markersize=4)
        best = int(np.argmax(values))
        right.plot(held_out[best]["step"], values[best], "o", color=_GREEN, markersize=10, fillstyle="none")
        right.set(xlabel="step", ylabel=metric, title=f"Held-out {metric}: best {values[best]:.4f}")
    else:
        right.set_axis_off()
    return _saved(figure, run_dir / "curves.png")


def draw_confusion(target: Path, labels: tuple[str, ...], counts: np.ndarray) -> Path:
    """Draw a confusion matrix, each row as shares of its class.

    Args:
        counts: int64 ``[classes, classes]``, rows true and columns predicted.
    """
    from matplotlib.figure import Figure

    classes = len(labels)
    side = min(14.0, 2.5 + 0.5 * classes)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    # A dollar sign in a name is one, not the begin of a formula.
    axes.set_xticks(range(classes), labels, rotation=90 if classes > 4 else 0, parse_math=False)
    axes.set_yticks(range(classes), labels, parse_math=False)
    if classes <= _MOST_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
    return _saved(figure, target)


def draw_runs(run_dir: Path, metric: str, runs: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Path:
    """Draw ``runs.png``: the score of every run on every split, with the median.

    Args:
        runs: name -> split -> scores.
    """
    from matplotlib.figure import Figure

    splits = [
        split for split in next(iter(runs.values())) if all(metric in run.get(split, ()) for run in runs.values())
    ]
    figure = Figure(figsize=(2.5 + 1.5 * max(1, len(splits)), 4), layout="constrained")
    axes = figure.subplots()
    for place, split in enumerate(splits):
        values = [run[split][metric] for run in runs.values()]
        axes.plot([place] * len(values), values, "o", color=_BLUE, alpha=0.6)
        axes.plot([place - 0.2, place + 0.2], [np.median(values)] * 2, color=_ORANGE, linewidth=2)
    axes.set_xticks(range(len(splits)), splits)
    axes.set(ylabel=metric, title=f"{len(runs)} runs; bar: median", xlim=(-0.5, max(1, len(splits)) - 0.5))
    return _saved(figure, run_dir / "runs.png")


def _saved(figure: Any, target: Path) -> Path:
    write_picture(target, figure, 130)
    return target
