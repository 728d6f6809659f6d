# SPDX-License-Identifier: Apache-2.0
"""The loss curve of a run as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bert.training.metrics_file import METRICS_FILE, read_metrics, rows_with
from parallel.whole_files import write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_curves(run_dir: Path, *, unigram_entropy: float | None = None) -> Path | None:
    """Draw ``curves.png`` of a run with metrics: losses on the left, learning rate and gradient norm on the right.

    Args:
        unigram_entropy: nats a token, drawn as a line that a model of word frequencies alone cannot pass.
    """
    from matplotlib.figure import Figure

    rows = read_metrics(run_dir / METRICS_FILE)
    train = rows_with(rows, "loss", "mlm_loss", "grad_norm", "learning_rate")
    valid = rows_with(rows, "valid_mlm_loss")
    if len(train) < 2:
        return None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_rows(left, train, "mlm_loss", color="#4c78a8", label="masked tokens, training")
    if valid:
        plot_rows(left, valid, "valid_mlm_loss", "o-", color="#f58518", markersize=4, label="masked tokens, held out")
    pairs = rows_with(train, "sop_loss")  # the objective may have changed on the way
    if pairs:
        plot_rows(left, pairs, "sop_loss", color="#54a24b", label="sentence pairs")
        left.axhline(math.log(2), color="#54a24b", linewidth=0.8, linestyle=":")
    if unigram_entropy is not None:
        left.axhline(unigram_entropy, color="0.4", linewidth=1.0, linestyle="--", label="entropy of word frequencies")
    left.set(xlabel="step", ylabel="loss (nats)", title="Loss", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    plot_rows(right, train, "grad_norm", color="#b279a2", label="gradient norm")
    right.set(xlabel="step", ylabel="gradient norm", title="Gradient norm and learning rate", yscale="log")
    twin = right.twinx()
    plot_rows(twin, train, "learning_rate", "--", color="0.5")
    twin.set(ylabel="learning rate (dashed)", ylim=(0, None))
    target = run_dir / "curves.png"
    write_picture(target, figure, 130)
    return target


def plot_rows(axes: Axes, rows: list[dict[str, Any]], name: str, style: str = "-", **more: Any) -> None:
    """A metric of rows over their steps."""
    axes.plot([row["step"] for row in rows], [row[name] for row in rows], style, **{"linewidth": 1.0, **more})
