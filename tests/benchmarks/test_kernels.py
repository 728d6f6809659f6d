# SPDX-License-Identifier: Apache-2.0
"""The benchmark of kernels counts what compilation leaves to torch."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.kernels import WAYS, main


def test_results(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    assert main(["--layers", "2", "--hidden", "16", "--length", "16", "--output", str(output)]) == 0
    found = json.loads(output.read_text())["found"]
    assert list(found) == list(WAYS)
    eager, layers, everything = (found[way] for way in WAYS)
    assert eager["inside"] == 0 < layers["inside"] < everything["inside"]
    assert everything["outside"] < layers["outside"] < eager["outside"]
    assert [one["graphs"] for one in (eager, layers, everything)] == [0, 1, 6]
    assert not any(one["compiled_later"] for one in (eager, layers, everything))
