# SPDX-License-Identifier: Apache-2.0
"""What the machine at hand is measured to do is read again."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_bert.cli import main
from megatron_bert.planning import bench, bench_link, timed
from megatron_bert.planning.devices import DEVICES, Link, Transfer, load_device, load_network
from megatron_bert.planning.plan_command import run_plan
from parallel.errors import UserError
from tests.megatron_bert.planning.support import CONFIGS
from tests.megatron_bert.planning.test_search import arguments
from tests.worlds import run_world


def test_a_measured_machine_is_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timed, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(bench, "_WIDTHS", {"cpu": (32, 64)})
    monkeypatch.setattr(bench, "_ROWS", {"cpu": 128})
    written = tmp_path / "here.yaml"
    assert main(["bench", "--device", "cpu", "--output", str(written)]) == 0
    device = load_device(str(written))
    assert device.source == "measured"
    assert not device.asynchronous
    assert set(device.peak_tflops) == {"float32", "bfloat16"}
    assert "link" not in yaml.safe_load(written.read_text())
    with pytest.raises(UserError, match="holds no link, for a single rank was measured"):
        load_network(written)
    capsys.readouterr()
    given = ["precision.compute=float32", "training.device=cpu", "--gpus", "1", "--gpu", str(written)]
    run_plan(arguments(str(CONFIGS / "bert_tiny.yaml"), *given))
    said = capsys.readouterr().out
    source = r"measured by megatron-bert bench --ranks 1, torch \S+, (1 thread|\d+ threads) per rank"
    heading = rf"1 x .+: [\d.e-]+ TFLOP/s in float32, [\d.]+ GiB \({source}\)"
    assert re.fullmatch(heading, said.splitlines()[0])
    assert "between nodes" not in said
    given[given.index("1")] = "2"
    run_plan(arguments(str(CONFIGS / "bert_tiny.yaml"), *given))
    said = capsys.readouterr().out
    assert "between nodes of 1: 50 GB/s a rank and 25 us (published; --network gives another)" in said
    assert "a single rank was measured, so each of the 2 counts as a node of its own" in said
    network = tmp_path / "network.yaml"
    network.write_text("link: {gigabytes_per_second: 1, latency_microseconds: 100}")
    run_plan(arguments(str(CONFIGS / "bert_tiny.yaml"), *given, "--network", str(network)))
    assert f"between nodes of 1: 1 GB/s a rank and 100 us (of {network})" in capsys.readouterr().out
    given[given.index("2")] = "1"
    run_plan(arguments(str(CONFIGS / "bert_tiny.yaml"), *given, "--network", str(network)))
    assert f"note: all ranks are in a node: --network {network} is not counted with" in capsys.readouterr().out


def test_devices_of_one_node_need_a_link(tmp_path: Path) -> None:
    values = DEVICES["h100"].model_dump() | {"link": None}
    for each, refused in ((1, False), (8, True)):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values | {"devices_per_node": each}))
        with pytest.raises(UserError, match="link is not set, but the 8") if refused else nullcontext():
            load_device(str(tmp_path / "mine.yaml"))


def _measured_link(at_once: int) -> dict[str, Any]:
    bench_link.MESSAGES, bench_link.ROUNDS, bench_link.NUMBERS = 2, 1, {"cpu": (0, 2**10, 2**12)}
    return bench_link.measure_link(timed.Ranks(torch.device("cpu"), at_once))[0]


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_messages_of_every_kind_and_number_of_ranks_are_measured(at_once: int) -> None:
    """Whether all ranks can compute at once, some, or one: all of them meet at the same points."""
    first, *others = run_world(4, _measured_link, at_once)
    assert all(other == first for other in others)
    link = Link.model_validate(first)
    assert set(link.by_ranks) == {2, 4}
    assert {kind: set(found.by_ranks) for kind, found in link.by_kind.items()} == {
        "all-gather": {2, 4},
        "reduce-scatter": {2, 4},
        "send": {2},
    }
    assert link.of("receive", 2) == link.by_kind["send"].by_ranks[2]
    assert link.of("all-reduce", 4).seconds("all-reduce", 1e6, 4) > 0


def test_ranks_need_not_divide_what_they_send() -> None:
    link = Link.model_validate(run_world(3, _measured_link, 2)[0])
    assert set(link.by_ranks) == {3}


@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "send"])
def test_costs_of_messages_are_fit_exactly(kind: str) -> None:
    made = Transfer(gigabytes_per_second=2.0, latency_microseconds=300.0, processor_share=0.5)
    costs = {size: (made.seconds(kind, size, 4), made.seconds(kind, size, 4) / 2) for size in (0, 1000, 10**6)}
    assert bench_link.plausible(costs)
    assert Transfer.model_validate(bench_link.fit(kind, 4, costs)).model_dump() == pytest.approx(made.model_dump())


def test_costs_that_are_noise_are_still_a_link() -> None:
    noise = {0: (-1e-5, -1e-6), 1000: (-2e-5, 0.0), 10**6: (-3e-5, 1e-6)}
    found = Transfer.model_validate(bench_link.fit("all-reduce", 2, noise))
    assert 0 < found.seconds("all-reduce", 1e6, 2) < 1e-4
    assert 0 <= found.processor_share <= 1
    assert not bench_link.plausible(noise)


def test_a_disturbed_measurement_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(bench, "_WIDTHS", {"cpu": (32,)})
    monkeypatch.setattr(bench, "_ROWS", {"cpu": 128})
    link = {"gigabytes_per_second": 1.0, "latency_microseconds": 1.0}
    for disturbed in (True, False):
        monkeypatch.setattr(bench, "measure_link", lambda _, disturbed=disturbed: (link, disturbed))
        device, _ = bench.bench(1, "cpu")
        assert ("measure again" in device.note) == disturbed


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--ranks", "0"], "--ranks is 0"),
        (["--output", "nowhere/x"], "nowhere/x cannot be written"),
        pytest.param(
            ["--device", "cuda", "--ranks", "2"],
            "--device is 'cuda' but this machine has no usable CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU"),
        ),
    ],
)
def test_what_bench_refuses(given: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *given]) == 2
    assert says in capsys.readouterr().err
