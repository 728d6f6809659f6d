# SPDX-License-Identifier: Apache-2.0
"""The benchmark of step times runs, and counts the activations that the engine really holds."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from benchmarks.pipeline import main
from parallel.pipeline.schedules import SCHEDULES
from tests.worlds import forkserver_context

pytestmark = pytest.mark.slow


def test_benchmark_at_tiny_size(tmp_path, capfd, monkeypatch):
    forkserver_context()  # whose processes have loaded torch
    forked = partial(torch.multiprocessing.start_processes, start_method="forkserver")
    monkeypatch.setattr(torch.multiprocessing, "spawn", forked)
    output = tmp_path / "report.json"
    sizes = ["--pipeline", "2", "--microbatches", "5", "--steps", "1", "--milliseconds", "1", "1", "1"]
    main([*sizes, "--output", str(output)])  # its exit code is about times, which a busy machine decides
    report = json.loads(output.read_text())
    assert report["command"].endswith(f"{' '.join(sizes)} --output {output}")
    assert [row["schedule"] for row in report["results"]] == list(SCHEDULES)
    for row in report["results"]:
        assert row["peak_activations"] == row["peak_activations_closed_form"]
        assert len(row["all_measured_seconds"]) == 1
    assert "zero-bubble-h1 is" in capfd.readouterr().out
