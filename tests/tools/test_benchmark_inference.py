# SPDX-License-Identifier: Apache-2.0
"""The benchmark of inference measures, keeps earlier rows, and draws."""

from __future__ import annotations

import json
import sys

from tools import benchmark_inference as benchmark


def _run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_inference", *map(str, arguments)])
    benchmark.main()


def test_a_report_grows_by_rows_and_is_drawn(monkeypatch, tmp_path, capsys):
    common = ("--shape", "tiny", "--models", tmp_path / "models", "--output", tmp_path / "report.json", "--rounds", 1)
    for length in (8, 16):
        _run(monkeypatch, *common, "--length", length, "--targets", "plain", "--systems", "integer", "torch fp32")
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["rows"]) == ["tiny B1 S8 T1", "tiny B1 S16 T1"]
    times = report["rows"]["tiny B1 S16 T1"]["times"]
    assert set(times) == {"integer W8A8 plain", "torch fp32"}
    # The same weights: integers are near the float model, and the file is a quarter of its size, tables included.
    assert times["integer W8A8 plain"]["signal_to_noise_db"] > 20
    assert times["integer W8A8 plain"]["file_megabytes"] < 0.3 * times["torch fp32"]["file_megabytes"]
    assert report["rows"]["tiny B1 S16 T1"]["ratios"]["integer W8A8 plain"]["fp32"] > 0
    _run(monkeypatch, *common, "--draw")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
