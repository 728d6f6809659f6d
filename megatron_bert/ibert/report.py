# SPDX-License-Identifier: Apache-2.0
"""Where a quantized model loses accuracy: ranges, saturation and signal to noise of every quantizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_bert.ibert.quantization import in_mode, quantizers
from megatron_bert.ibert.quantizer import Quantizer, Tap
from parallel.errors import UserError
from parallel.whole_files import write_picture


@dataclass(frozen=True, kw_only=True)
class QuantizerReport:
    """One quantizer, against the float model of the same weights.

    Attributes:
        name: ``encoder.layers.3.ranges.query``.
        kind, bits: of the integers.
        range: largest value that is represented.
        peak: largest magnitude in the float model.
        saturation: share of the float model's elements that are beyond the range.
        snr: signal to noise of the integers' real values in dB, over all that was lost up to there; infinite without
            noise, NaN without a signal.
    """

    name: str
    kind: str
    bits: int
    range: float
    peak: float
    saturation: float
    snr: float

    @property
    def layer(self) -> int | None:
        """Number of the layer; None outside of layers."""
        parts = self.name.split(".")
        return int(parts[parts.index("layers") + 1]) if "layers" in parts else None


class _Sums:
    """What is added up for one quantizer."""

    def __init__(self) -> None:
        self.signal = self.noise = self.peak = 0.0
        self.beyond = self.elements = 0

    def snr(self) -> float:
        if self.signal == 0.0:
            return math.nan
        return math.inf if self.noise == 0.0 else 10.0 * math.log10(self.signal / self.noise)


@torch.no_grad()
def compare_with_float(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any]
) -> list[QuantizerReport]:
    """Run the float and the integer model on the same batches and compare every tensor that has a quantizer.

    Ranges stay as they are. Under parallelism each rank reports what it holds.

    Args:
        model: quantized and calibrated, in evaluation mode.
        batches: a few.
        forward: runs the model on one of them.

    Returns:
        A report a quantizer, in the order of the model; those that took no part are left out.

    Raises:
        UserError: there was no batch.
    """
    named = list(quantizers(model))
    frozen = [quantizer.frozen for _, quantizer in named]
    sums = {quantizer: _Sums() for _, quantizer in named}
    try:
        for _, quantizer in named:
            quantizer.frozen = True
        for batch in batches:
            floats: dict[Quantizer, list[Tensor]] = {}

            def hold(quantizer: Quantizer, x: Tensor, floats: dict[Quantizer, list[Tensor]] = floats) -> None:
                floats.setdefault(quantizer, []).append(x)

            def compare(quantizer: Quantizer, x: Tensor, floats: dict[Quantizer, list[Tensor]] = floats) -> None:
                _compare(sums[quantizer], quantizer, x, floats[quantizer].pop(0))

            _run(model, "observe", hold, batch, forward)
            _run(model, "integer", compare, batch, forward)
    finally:
        for (_, quantizer), before in zip(named, frozen, strict=True):
            quantizer.frozen, quantizer.tap = before, None
    if not any(found.elements for found in sums.values()):
        raise UserError("there is no data to compare the models on: give at least one batch")
    return [
        QuantizerReport(
            name=name,
            kind=quantizer.kind,
            bits=quantizer.bits,
            range=quantizer.limit(),
            peak=found.peak,
            saturation=found.beyond / found.elements,
            snr=found.snr(),
        )
        for name, quantizer in named
        if (found := sums[quantizer]).elements
    ]


def _run(model: nn.Module, mode: Any, tap: Tap, batch: Any, forward: Callable[[Any], Any]) -> None:
    for _, quantizer in quantizers(model):
        quantizer.tap = tap
    with in_mode(model, mode):
        forward(batch)


def _compare(sums: _Sums, quantizer: Quantizer, integers: Tensor, real: Tensor) -> None:
    target, scale = quantizer.target(), quantizer.scale()
    values = integers if target.unit != 1.0 else integers.double() * scale
    reference = real.double()
    sums.signal += float(reference.square().sum())
    sums.noise += float((values.double() - reference).square().sum())
    sums.peak = max(sums.peak, float(reference.abs().max()))
    sums.beyond += int(((reference > (target.high + 0.5) * scale) | (reference < (target.low - 0.5) * scale)).sum())
    sums.elements += reference.numel()


def as_table(rows: Sequence[QuantizerReport]) -> str:
    """The reports as text, a line each, the worst signal to noise of all marked."""
    worst = min((row.snr for row in rows if math.isfinite(row.snr)), default=math.nan)
    width = max([len("tensor"), *(len(row.name) for row in rows)])
    lines = [f"{'tensor':<{width}}  kind    bits      range       peak  saturated  SNR (dB)"]
    lines += [
        f"{row.name:<{width}}  {row.kind:<6}  {row.bits:>4}  {row.range:>9.4g}  {row.peak:>9.4g}  "
        f"{row.saturation:>8.3%}  {row.snr:>8.1f}{'  <- worst' if row.snr == worst else ''}"
        for row in rows
    ]
    return "\n".join(lines)


def plot(rows: Sequence[QuantizerReport], path: str | Path) -> None:
    """Write a PNG: signal to noise, saturation and range of each kind of tensor over the layers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 10), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1, sharex=True)
    in_layers = [row for row in rows if row.layer is not None]
    points = list(dict.fromkeys(row.name.rpartition(".")[2] for row in in_layers))
    for place, point in enumerate(points):
        chosen = [row for row in in_layers if row.name.rpartition(".")[2] == point]
        layers = [row.layer for row in chosen]
        style = {"marker": "o", "markersize": 3, "color": f"C{place % 10}", "linestyle": "-" if place < 10 else "--"}
        panels[0].plot(layers, [row.snr for row in chosen], label=point, **style)
        panels[1].plot(layers, [100 * row.saturation for row in chosen], **style)
        panels[2].plot(layers, [row.range for row in chosen], **style)
    for panel, label in zip(panels, ("signal to noise (dB)", "saturated (%)", "range"), strict=True):
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[2].set_yscale("log")
    panels[2].set_xlabel("layer")
    panels[0].legend(ncols=4, fontsize="small")
    write_picture(Path(path), figure, 120)
