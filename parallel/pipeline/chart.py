# SPDX-License-Identifier: Apache-2.0
"""Drawings of a timeline, simulated or recorded: text for a terminal, a PNG Gantt chart, a trace for Perfetto."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.pipeline.actions import Action, ActionKind
from parallel.pipeline.simulate import TimedAction, Timeline
from parallel.whole_files import write_picture, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KIND_NAMES = {
    ActionKind.FORWARD: "forward",
    ActionKind.BACKWARD: "backward",
    ActionKind.BACKWARD_INPUT: "input gradient",
    ActionKind.BACKWARD_WEIGHT: "weight gradient",
}
#: Blue, orange, yellow and green that stay apart for color-blind readers, light enough for black numbers.
_COLORS = {
    ActionKind.FORWARD: "#5aa9e6",
    ActionKind.BACKWARD: "#ee9a4d",
    ActionKind.BACKWARD_INPUT: "#f0c93f",
    ActionKind.BACKWARD_WEIGHT: "#57b894",
}


def text_grid(timeline: Timeline, *, width: int | None = None, failed: tuple[int, Action] | None = None) -> str:
    """One row a rank; an action is written where it starts and drawn out while it lasts.

    A column is the time of the shortest action that takes any.

    Args:
        width: characters in a line; longer grids are continued below. None for no limit.
        failed: rank and action to mark with ``>`` and ``<``.
    """
    columns = _columns(timeline)
    cell = max((len(str(event.action)) for event in timeline.events), default=1) + 2
    label = len(f"rank {timeline.ranks - 1}")
    length = max((end for row in columns for _, _, end in row), default=0)
    rows = []
    for rank, row in enumerate(columns):
        text = ""
        for action, start, end in row:
            mark = (">", "<") if failed == (rank, action) else (" ", " ")
            text = text.ljust(start * cell) + f"{mark[0]}{action}{mark[1]}".ljust((end - start) * cell, "-")
        rows.append(text.ljust(length * cell))
    per_band = max(1, length if width is None else (width - label - 1) // cell)
    bands = []
    for first in range(0, length, per_band):
        part = slice(first * cell, (first + per_band) * cell)
        bands.append("\n".join(f"{f'rank {rank}':<{label}}|{row[part]}".rstrip() for rank, row in enumerate(rows)))
    return "\n\n".join(bands)


def _columns(timeline: Timeline) -> list[list[tuple[Action, int, int]]]:
    """Each rank's actions with their first column and the one past their last."""
    tick = min((event.end - event.start for event in timeline.events if event.end > event.start), default=1.0)
    columns: list[list[tuple[Action, int, int]]] = [[] for _ in range(timeline.ranks)]
    for event in timeline.events:
        row = columns[event.rank]
        # Rounding may make neighbors overlap; an action keeps a column of its own.
        start = max(round((event.start - timeline.start) / tick), row[-1][2] if row else 0)
        end = max(round((event.end - timeline.start) / tick), start + 1)
        row.append((event.action, start, end))
    return columns


def chrome_trace(timeline: Timeline, path: Path, *, microseconds: float = 1e6) -> None:
    """Write a timeline in the Trace Event format, which Perfetto and chrome://tracing load.

    Ranks are processes and chunks are threads.

    Args:
        microseconds: of one unit of the timeline's time; the default is for seconds.
    """
    events: list[dict[str, object]] = []
    tracks = sorted(
        {(event.rank, event.action.stage // timeline.ranks, event.action.stage) for event in timeline.events}
    )
    for rank in range(timeline.ranks):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
    for rank, chunk, stage in tracks:
        name = {"name": f"chunk {chunk} (stage {stage})"}
        events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": chunk, "args": name})
    events += [_trace_event(event, timeline, microseconds) for event in timeline.events]
    write_text(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _trace_event(event: TimedAction, timeline: Timeline, microseconds: float) -> dict[str, object]:
    action = event.action
    return {
        "ph": "X",
        "name": str(action),
        "cat": _KIND_NAMES[action.kind],
        "pid": event.rank,
        "tid": action.stage // timeline.ranks,
        "ts": (event.start - timeline.start) * microseconds,
        "dur": (event.end - event.start) * microseconds,
        "args": {"stage": action.stage, "microbatch": action.microbatch},
    }


def gantt_png(charts: Sequence[tuple[str, Timeline]], path: Path) -> None:
    """Draw timelines one below the other, with the same time axis, into a PNG.

    An action is colored by its kind, lighter on later chunks, and carries its microbatch's number where that fits. The
    bubble is added to each title.
    """
    # Imported here: drawing is the only use of matplotlib, and training must not wait for its import.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    inches = 14.0
    heights = [timeline.ranks for _, timeline in charts]
    figure = Figure(figsize=(inches, 1.0 + sum(0.36 * ranks + 0.8 for ranks in heights)), dpi=150, layout="constrained")
    rows = figure.subplots(len(charts), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})
    span = max(timeline.makespan for _, timeline in charts)
    for axes, (title, timeline) in zip(rows[:, 0], charts, strict=True):
        _draw(axes, timeline, points_per_time=inches * 72 * 0.93 / span if span else 1.0)
        axes.set_title(f"{title}: bubble {timeline.bubble:.1%}, time {timeline.makespan:g}", loc="left", fontsize=11)
        axes.set_xlim(0, span * 1.002)
    rows[-1, 0].set_xlabel("time")
    kinds = [kind for kind in ActionKind if any(e.action.kind is kind for _, line in charts for e in line.events)]
    patches = [Patch(facecolor=_COLORS[kind], edgecolor="#333333", label=_KIND_NAMES[kind]) for kind in kinds]
    if any(event.action.stage >= line.ranks for _, line in charts for event in line.events):
        patches.append(Patch(facecolor="white", edgecolor="#333333", label="paler: later chunk"))
    figure.legend(handles=patches, loc="outside upper right", ncols=len(patches), frameon=False, fontsize=10)
    write_picture(path, figure, 150)


def _draw(axes: Axes, timeline: Timeline, points_per_time: float) -> None:
    chunks = max((event.action.stage // timeline.ranks for event in timeline.events), default=0) + 1
    digits = len(str(max((event.action.microbatch for event in timeline.events), default=0)))
    spans = [(event.start - timeline.start, event.end - event.start) for event in timeline.events]
    axes.barh(
        [event.rank for event in timeline.events],
        [duration for _, duration in spans],
        left=[start for start, _ in spans],
        color=[_shade(event.action, timeline.ranks, chunks) for event in timeline.events],
        height=0.92,
        edgecolor="#333333",
        linewidth=0.5,
    )
    for event, (start, duration) in zip(timeline.events, spans, strict=True):
        size = min(9.0, duration * points_per_time / (0.62 * digits + 0.25))
        if size >= 4:
            number = str(event.action.microbatch)
            axes.text(start + duration / 2, event.rank, number, ha="center", va="center", fontsize=size)
    axes.set_yticks(range(timeline.ranks), [f"rank {rank}" for rank in range(timeline.ranks)])
    axes.set_ylim(timeline.ranks - 0.5, -0.5)
    axes.set_facecolor("#eeeeee")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _shade(action: Action, ranks: int, chunks: int) -> str:
    """The kind's color for the first chunk, towards white for later ones."""
    white = 0.6 * (action.stage // ranks) / max(1, chunks - 1)
    color = _COLORS[action.kind]
    channels = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(channel + (255 - channel) * white):02x}" for channel in channels)
