# SPDX-License-Identifier: Apache-2.0
"""Models of any size have numbers that say something."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from megatron_bert.planning import picture
from megatron_bert.planning.dry_run_command import measure
from megatron_bert.planning.plan_command import run_plan
from megatron_bert.planning.units import BYTES, DECIMAL_BYTES, OPERATIONS, parts_of, short, unit_of, with_unit
from tests.megatron_bert.planning.support import CONFIGS
from tests.megatron_bert.planning.test_search import arguments


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (with_unit(18.5 * 2**30), "18.5 GiB"),
        (with_unit(5000 * 2**30), "5,000.0 GiB"),
        (with_unit(0.7 * 2**30), "716.8 MiB"),
        (with_unit(100), "100 B"),
        (with_unit(0), "0.0 GiB"),
        (with_unit(-3 * 2**20), "-3.0 MiB"),
        (with_unit(1.5e9, DECIMAL_BYTES, 2), "1.50 GB"),
        (with_unit(2e7, OPERATIONS), "20.0 MFLOP"),
        (
            parts_of({"weights": 1.5 * 2**20, "buffers": 9.0, "logits": 2.0**22}, unit_of(2**22)),
            "logits 4.00, weights 1.50",
        ),
        (unit_of(2**20 - 1, BYTES).name, "KiB"),
        (short(0), "0.0"),
        (short(0.00213), "0.0021"),
        (short(0.96), "1.0"),
        (short(34.56), "34.6"),
        (short(12345), "12,345"),
    ],
)
def test_numbers_are_said_in_their_unit(said: str, expected: str) -> None:
    assert said == expected


#: A number that says nothing.
NOTHING = re.compile(r"(?<![\d.,])0\.0+ (GiB|MiB|GB|MB|TFLOP|GFLOP|s)\b")


@pytest.mark.parametrize("config", ["bert_tiny", "bert_345m"])
def test_the_plan_of_a_model_of_any_size(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(picture, "write_picture", lambda _, figure, __: drawn.append(figure))
    run_plan(arguments(str(CONFIGS / f"{config}.yaml"), "--gpus", "4", "--png", str(tmp_path / "x.png")))
    said = capsys.readouterr().out
    assert not NOTHING.search(said), said
    (header,) = (line for line in said.splitlines() if line.startswith("tensor  "))
    assert ("MiB" if config == "bert_tiny" else "GiB") in header
    memory = drawn[0].axes[0]
    highest = max(bar.get_y() + bar.get_height() for bar in memory.patches)
    assert highest > 0.15 * memory.get_ylim()[1]
    assert "of 73.5 GiB that are usable" in memory.get_title()


def test_memory_while_a_run_is_built_is_said_where_it_is_most(capsys: pytest.CaptureFixture[str]) -> None:
    """Weights are whole, in float32, before data ranks divide them."""
    small = ["training.global_batch_size=8", "training.micro_batch_size=1", "parallel.sharding=full", "--gpus", "8"]
    run_plan(arguments(str(CONFIGS / "bert_345m.yaml"), *small, "--top", "1"))
    said = capsys.readouterr().out
    assert re.search(r"as configured: .* data 8 \(full\), micro batch 1, none: 1\.3 GiB", said), said


def test_the_dry_run_of_a_small_model() -> None:
    (line,) = measure("pretrain", CONFIGS / "bert_tiny.yaml", [], 2)
    takes = r"takes [\d.]+ MiB at its peak, [\d.]+ GFLOP and [\d.]+ MB of messages a step"
    assert re.fullmatch(f"dry run: rank 0 of 2 {takes}", line)
