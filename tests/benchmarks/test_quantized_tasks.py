# SPDX-License-Identifier: Apache-2.0
"""The benchmark of quantized models on tasks: which runs it asks for, and what it makes of their results."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quantized_tasks as benchmark


def test_runs_of_a_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, list[str]] = {}

    def finished_run(run: Any, kind: Any, file: Path, directory: Path, changes: list[str]) -> dict[str, Any]:
        asked[directory.name] = changes
        score = 0.5 + len(asked) / 10
        splits = {"valid": {"accuracy": score, "loss": 1.0}, "test": {"accuracy": score - 0.05}}
        if directory.name.startswith("w"):
            splits |= {f"{split}_calibrated": {"accuracy": 0.25} for split in ("valid", "test")}
        return {"metric": "accuracy", "splits": splits}

    monkeypatch.setattr(benchmark, "finished_run", finished_run)
    arguments = argparse.Namespace(
        epochs=2.0, rate=1e-5, weight_bits=[8, 7], change=["optimizer.weight_decay=0"], quantized_change=["a.b=1"]
    )
    metric, scores = benchmark.score_seed(tmp_path / "task.yaml", 3, tmp_path, arguments)
    assert metric == "accuracy"
    # Settings files may ask for several seeds, of which the benchmark wants one.
    assert asked["float"] == ["training.seed=3", "training.seeds=null"]
    assert {"model.keep_head=true", f"model.from={tmp_path / 'float'}", "training.epochs=2.0"} <= set(asked["further"])
    assert asked["w8"] == [*asked["further"], "quantization.weight_bits=8", "a.b=1"]
    assert scores == {
        "float": {"valid": 0.6, "test": pytest.approx(0.55)},
        "further": {"valid": 0.7, "test": pytest.approx(0.65)},
        "w8 calibrated": {"valid": 0.25, "test": 0.25},
        "w8 trained": {"valid": 0.8, "test": pytest.approx(0.75)},
        "w7 calibrated": {"valid": 0.25, "test": 0.25},
        "w7 trained": {"valid": 0.9, "test": pytest.approx(0.85)},
    }
