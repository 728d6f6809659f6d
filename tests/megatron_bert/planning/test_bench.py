# SPDX-License-Identifier: Apache-2.0
"""What the machine at hand is measured to do is read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_bert.cli import main
from megatron_bert.planning import bench
from megatron_bert.planning.devices import Link, load_device, load_network
from megatron_bert.planning.plan_command import run_plan
from tests.megatron_bert.planning.support import CONFIGS
from tests.megatron_bert.planning.test_search import arguments
from tests.worlds import run_world


def test_a_measured_machine_is_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(bench, "_WIDTHS", {"cpu": (32, 64)})
    monkeypatch.setattr(bench, "_ROWS", {"cpu": 128})
    written = tmp_path / "here.yaml"
    assert main(["bench", "--device", "cpu", "--output", str(written)]) == 0
    device = load_device(str(written))
    assert device.source == "measured"
    assert not device.asynchronous
    assert set(device.peak_tflops) == {"float32", "bfloat16"}
    assert load_network(written).gigabytes_per_second > 0
    capsys.readouterr()
    given = ["precision.compute=float32", "training.device=cpu", "--gpus", "1", "--gpu", str(written)]
    run_plan(arguments(str(CONFIGS / "bert_tiny.yaml"), *given))
    assert "measured by megatron-bert bench --ranks 1" in capsys.readouterr().out


def _measured_link() -> dict[str, object]:
    bench._MESSAGES = 2
    return bench._link(torch.device("cpu"))


def test_messages_of_every_number_of_ranks_are_measured() -> None:
    for link in run_world(4, _measured_link):
        assert set(link["latency_by_ranks"]) == {2, 4}
        assert Link.model_validate(link).latency(2) > 0


@pytest.mark.parametrize(
    ("given", "says"), [(["--ranks", "0"], "--ranks is 0"), (["--output", "nowhere/x"], "nowhere/x cannot be written")]
)
def test_what_bench_refuses(given: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *given]) == 2
    assert says in capsys.readouterr().err
