# SPDX-License-Identifier: Apache-2.0
"""The benchmark of data parallelism on one rank counts and times what each kind of step does."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.data_parallel import KINDS, main


def test_results(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    options = ["--layers", "2", "--hidden", "8", "--rounds", "1", "--output", str(output)]
    assert main(options) == 0
    report = json.loads(output.read_text())
    assert report["command"].endswith(" ".join(options))
    found = report["found"]
    assert list(found) == list(KINDS)
    assert found["plain modules"]["to_plain"] == 1.0
    # Kernels are counted, not timed: what flat buffers add are a cast, sums of squares and the factor.
    assert found["flat buffers"]["operators"] < found["FSDP2"]["operators"]
    assert found["flat buffers"]["operators"] < found["plain modules"]["operators"] + 120
