# SPDX-License-Identifier: Apache-2.0
"""The benchmark of inference, on a tiny model and with the systems that the tests install."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import inference as benchmark
from benchmarks.inference_memory import memory
from benchmarks.inference_systems import Models


def _run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["inference", *map(str, arguments)])
    benchmark.main()


def test_a_report_grows_by_rows_and_is_drawn(monkeypatch, tmp_path, capsys):
    common = ("--shape", "tiny", "--models", tmp_path / "models", "--output", tmp_path / "report.json", "--rounds", 1)
    _run(monkeypatch, *common, "--length", 8, 16, "--targets", "plain", "--systems", "integer", "torch fp32")
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
    found = memory(Models(tmp_path / "models", "tiny"), 1, 8, 1, ["NativeModel", "python and numpy"])
    assert (
        found["integer W8A8 (NativeModel)"]["resident_megabytes"]
        < 60 + (found["python and numpy"]["resident_megabytes"])
    )


def test_peers_are_of_the_kind_they_multiply_in():
    names = {"torch fp32": "fp32", "openvino bf16": "bf16", "openvino nncf int8 and bf16": "int8", "IBert": ""}
    assert {name: benchmark.kind_of(name) for name in names} == names
    times = {name: {"milliseconds": 4.0 + place} for place, name in enumerate(names)}
    times["integer W8A8 amx"] = {"milliseconds": 2.0}
    assert benchmark.ratios(times) == {"integer W8A8 amx": {"fp32": 2.0, "bf16": 2.5, "int8": 3.0}}


def test_one_that_takes_longer_than_its_time_is_run_once():
    runs: dict[str, int] = {"slow": 0, "fast": 0}

    def run(name: str) -> benchmark.Ready:
        def count(_: torch.Tensor) -> None:
            runs[name] += 1

        return benchmark.Ready(count, {})

    times = benchmark.measure({"slow": run("slow")}, torch.zeros(1, 1), rounds=3, budget=-1.0)
    assert list(times["slow"]) == ["milliseconds", "median"]
    benchmark.measure({"fast": run("fast")}, torch.zeros(1, 1), rounds=3, budget=10.0)
    assert runs == {"slow": 1, "fast": 4}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
def test_newer_instructions_are_hidden_from_torch(tmp_path):
    library = tmp_path / "hidden.so"
    source = Path(benchmark.__file__).with_name("hidden_instructions.c")
    subprocess.run(["cc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", source, "-o", library], check=True)
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    environment = os.environ | {"HIDDEN_INSTRUCTIONS": "avx2", "LD_PRELOAD": str(library)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if "cannot hide instruction sets" in done.stderr:
        pytest.skip("no CPUID faulting here")
    assert done.stdout in ("AVX2\n", "DEFAULT\n")
