# SPDX-License-Identifier: Apache-2.0
"""Scores of several models and seeds: medians, a line and a picture."""

from __future__ import annotations

from pathlib import Path

from tools.task_scores import describe, draw, summarize


def test_medians_and_picture(tmp_path: Path) -> None:
    seeds = {number: {"float": {"test": value}, "further": {"test": -value}} for number, value in enumerate((1, 5, 2))}
    seeds[1]["rarely"] = {"test": 7}
    splits = summarize(seeds)
    assert splits == {
        "test": {
            "float": {"seeds": [1, 5, 2], "median": 2},
            "further": {"seeds": [-1, -5, -2], "median": -2},
            "rarely": {"seeds": [7], "median": 7},
        }
    }
    task = {"metric": "matthews", "splits": splits}
    assert describe("task", task) == "task test matthews: float 2.0000, further -2.0000, rarely 7.0000"
    draw({"task": task}, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 1000
