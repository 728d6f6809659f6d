# SPDX-License-Identifier: Apache-2.0
"""The benchmark of checkpoints measures both kinds of saves, and leaves nothing but its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.checkpoints import main


def test_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--size", "tiny", "--step-seconds", "0.001", "--saves", "1", "--rounds", "1", "--output", "results.json"]
    assert main(options) == 0
    report = json.loads(Path("results.json").read_text())
    assert report["command"].endswith(" ".join(options))
    assert report["bytes"] == 12 * 198_272
    for (found,) in report["results"].values():
        assert 0 < found["stall_seconds"] <= found["seconds"]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
