# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

from matplotlib.image import imread

from parallel.pipeline.chart import chrome_trace, gantt_png, text_grid
from parallel.pipeline.schedules import build_schedule
from parallel.pipeline.simulate import Costs, TimedAction, Timeline, simulate
from tests.parallel.pipeline.grid import action_of


def test_text_grid_of_1f1b():
    assert text_grid(simulate(build_schedule("1f1b", 2, 3))).splitlines() == [
        "rank 0| 0F0  0F1            0B0 ----- 0F2  0B1 -----      0B2 -----",
        "rank 1|      1F0  1B0 ----- 1F1  1B1 ----- 1F2  1B2 -----",
    ]


def test_text_grid_marks_the_failing_action_of_its_rank_only():
    grid = text_grid(simulate(build_schedule("1f1b", 2, 3)), failed=(1, action_of("1B1")))
    assert grid.count(">") == grid.count("<") == 1
    assert ">1B1<-----" in grid.splitlines()[1]


def test_text_grid_continues_below_in_narrow_terminals():
    timeline = simulate(build_schedule("zero-bubble-v", 3, 5))
    wide, narrow = text_grid(timeline), text_grid(timeline, width=40)
    assert max(map(len, narrow.splitlines())) <= 40
    bands = narrow.split("\n\n")
    assert len(bands) > 1
    for rank in range(3):
        joined = [action for band in bands for action in band.splitlines()[rank].split("|")[1].split()]
        assert joined == wide.splitlines()[rank].split("|")[1].split()


def test_text_grid_of_uneven_recorded_times_keeps_every_action():
    schedule = build_schedule("zero-bubble-h1", 3, 4)
    timeline = simulate(schedule, Costs((0.9, 1, 1.2), 1.31, 0.77, communication=0.05))
    shifted = Timeline(3, tuple(TimedAction(e.rank, e.action, e.start + 100, e.end + 100) for e in timeline.events))
    grid = text_grid(shifted)
    for rank, actions in enumerate(schedule.actions):
        row = grid.splitlines()[rank].split("|")[1].replace("-", " ").split()
        assert row == [str(action) for action in actions]
    assert text_grid(timeline) == grid


def test_text_grid_of_nothing():
    assert text_grid(Timeline(2, ())) == ""


def test_chrome_trace_has_a_slice_for_each_action(tmp_path):
    schedule = build_schedule("interleaved-1f1b", 2, 2, 2)
    path = tmp_path / "trace.json"
    chrome_trace(simulate(schedule), path, microseconds=1e3)
    events = json.loads(path.read_text())["traceEvents"]
    slices = {event["name"]: event for event in events if event["ph"] == "X"}
    assert sorted(slices) == sorted(str(action) for run in schedule.actions for action in run)
    assert slices["3B1"]["dur"] == 2000
    assert (slices["3B1"]["pid"], slices["3B1"]["tid"]) == (1, 1)
    assert slices["3B1"]["args"] == {"stage": 3, "microbatch": 1}
    assert slices["0F1"]["ts"] == 1000
    names = {(event["pid"], event.get("tid")): event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names[0, None] == "rank 0"
    assert names[1, 1] == "chunk 1 (stage 3)"


def test_png_shows_each_kind_of_action(tmp_path):
    path = tmp_path / "chart.png"
    charts = [(name, simulate(build_schedule(name, 2, 3))) for name in ("1f1b", "zero-bubble-v")]
    gantt_png(charts, path)
    pixels = (imread(path)[..., :3] * 255).round().astype(int)
    colors = {f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in pixels[::8, ::4].reshape(-1, 3)}
    assert {"#5aa9e6", "#ee9a4d", "#f0c93f", "#57b894"} <= colors
    assert pixels.shape[1] > 2000
