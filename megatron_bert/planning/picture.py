# SPDX-License-Identifier: Apache-2.0
"""A plan as a picture: memory by part, the step of the fastest layout, and throughput of others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_bert.planning.layouts import stages_of
from megatron_bert.planning.memory import rank_memory
from megatron_bert.planning.search import Prediction, usable_bytes
from megatron_bert.planning.units import unit_of, with_unit
from parallel.pipeline.actions import ActionKind
from parallel.whole_files import write_picture

_COLORS = {
    "weights": "#4c72b0",
    "gradients": "#dd8452",
    "optimizer": "#55a868",
    "activations": "#c44e52",
    "logits": "#8172b3",
    "buffers": "#937860",
    "temporaries": "#8c8c8c",
}
#: Times the memory of the fullest rank up to which the line of what is usable is drawn.
_MOST_ROOM = 5
_KINDS = {
    ActionKind.FORWARD: "#4c72b0",
    ActionKind.BACKWARD: "#55a868",
    ActionKind.BACKWARD_INPUT: "#55a868",
    ActionKind.BACKWARD_WEIGHT: "#dd8452",
}


def draw_plan(predictions: Sequence[Prediction], path: Path) -> None:
    """Draw predictions, the fastest first; its memory by pipeline rank and its step in detail."""
    # Imported here: most plans are only printed, and matplotlib takes half a second to import.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    memory, step, speed = figure.subplots(3, 1)
    best = predictions[0]
    stages = stages_of(best.workload, best.layout, best.stage_layers)
    ranks = list(range(best.layout.pipeline))
    bottom = [0.0] * len(ranks)
    found = [rank_memory(best.workload, best.layout, stages, rank).parts for rank in ranks]
    peak, usable = max(sum(parts.values()) for parts in found), usable_bytes(best.machine)
    unit = unit_of(peak)
    for part, color in _COLORS.items():
        sizes = [parts.get(part, 0.0) / unit.size for parts in found]  # type: ignore[call-overload]
        memory.bar(ranks, sizes, bottom=bottom, color=color, label=part)
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    title = f"memory of the fastest layout, of {with_unit(usable)} that are usable"
    if usable <= _MOST_ROOM * peak:  # where much more is usable, bars would be too low to see
        memory.axhline(usable / unit.size, color="black", linestyle="--", linewidth=1)
    memory.set(title=title, xlabel="pipeline rank", ylabel=unit.name, xticks=ranks)
    memory.legend(fontsize=7, ncols=len(_COLORS), loc="lower center")
    _draw_step(step, best)
    names = [_name(prediction) for prediction in predictions]
    speed.barh(names, [prediction.tokens_per_second for prediction in predictions], color="#4c72b0")
    speed.invert_yaxis()
    speed.set(title="throughput", xlabel="tokens/s")
    speed.tick_params(axis="y", labelsize=7)
    write_picture(path, figure, 100)


def _draw_step(axes: object, best: Prediction) -> None:
    time, end = best.time, 0.0
    bars = axes.barh  # type: ignore[attr-defined]
    if time.timeline is not None:
        end = time.timeline.makespan
        for event in time.timeline.events:
            bars(event.rank, event.end - event.start, left=event.start, height=0.8, color=_KINDS[event.action.kind])
    else:
        bars(0, time.pipeline, color=_KINDS[ActionKind.FORWARD])
        end = time.pipeline
    for rank in range(best.layout.pipeline):
        bars(rank, time.data, left=end, height=0.8, color="#937860")
        bars(rank, time.optimizer, left=end + time.data, height=0.8, color="#c44e52")
    note = "" if time.timeline is None or end >= time.pipeline * 0.999 else ", its first micro batches"
    axes.set(  # type: ignore[attr-defined]
        title=f"its step{note}: passes, data axis, optimizer",
        xlabel="seconds",
        ylabel="pipeline rank",
        yticks=range(best.layout.pipeline),
    )
    axes.invert_yaxis()  # type: ignore[attr-defined]


def _name(prediction: Prediction) -> str:
    layout = prediction.layout
    sequence = "s" if layout.sequence else ""
    return (
        f"t{layout.tensor}{sequence} p{layout.pipeline} {layout.schedule} x{layout.chunks} d{layout.data} "
        f"{layout.sharding} m{layout.micro_batch} {layout.recompute}"
    )
