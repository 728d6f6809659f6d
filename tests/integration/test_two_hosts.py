# SPDX-License-Identifier: Apache-2.0
"""A run over two hosts, with a third in reserve: a worker is killed, a host vanishes, then another is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.training.metrics_file import METRICS_FILE, read_metrics
from parallel.checkpoint import STATE_FILE, latest_checkpoint
from tests.integration.cluster_support import need
from tests.integration.hosts import INTERFACE, PROGRAMS, Hosts
from tests.integration.slurm_cluster import free_ports
from tests.integration.slurm_runs import undisturbed
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import rows, run_settings, tensors, write_config
from tests.pictures import WITHOUT_PICTURES
from tests.worlds import run_world

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 40, 5
PATIENCE = 120.0


def until(done: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := done()):
        assert time.monotonic() < deadline, f"{what} did not happen in time"
        time.sleep(0.1)
    return found


def starts(logs: Path) -> list[dict[str, Any]]:
    """What each rank of each start said first, in the order of time."""
    lines = [line for path in logs.glob("rank_*.jsonl") for line in path.read_text().splitlines()]
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return sorted((event for event in events if event["event"] == "started"), key=lambda event: event["time"])


def partner(logs: Path) -> str:
    """The host that the head host last started with."""
    return next(event["host"] for event in starts(logs)[-2:] if event["host"] != "hosta")


def steps_since(run: Path, count: int) -> Callable[[], bool]:
    """Whether the run has made steps since it was resumed for the count-th time, and saved one of them."""

    def done() -> bool:
        log = run / "logs" / "rank_00000.log"
        texts = log.read_text().split("resuming from ") if log.exists() else [""]
        last = [int(line.split()[1].split("/")[0]) for line in texts[-1].splitlines() if line.startswith("step ")]
        newest = latest_checkpoint(run / "checkpoints")
        return len(texts) > count and len(last) >= EVERY and newest is not None and int(newest.name[5:]) >= last[0]

    return done


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_lost_worker_lost_host_and_no_spare(tmp_path: Path) -> None:
    need(PROGRAMS, "iproute2 procps")
    make_data(tmp_path)
    run = tmp_path / "run"
    settings = run_settings(
        tmp_path,
        run,
        training__steps=STEPS,
        parallel__data=None,
        parallel__elastic=True,
        parallel__timeout_seconds=10,
        checkpoint__every=EVERY,
    )
    write_config(settings, tmp_path / "settings.yaml")
    options = ["--processes", "1", "--hosts", "1:2", "--interface", INTERFACE, "--logs", str(run / "logs")]
    with Hosts("hosta", "hostb", "hostc") as hosts:
        head = f"{hosts.address('hosta')}:29500"
        command = ["bash", str(ROOT / "launch" / "torchrun.sh"), *options, "--head", head, "pretrain", "settings.yaml"]
        variables = {
            "PYTHON": sys.executable,
            "PYTHONPATH": WITHOUT_PICTURES,
            "OMP_NUM_THREADS": "1",
            "PACE": "0.1",
            "RDZV_CONF": "last_call_timeout=12,keep_alive_interval=1",
        }

        def start(name: str) -> None:
            hosts.start(name, command, tmp_path / f"{name}.out", tmp_path, **variables)

        start("hosta")
        start("hostb")
        until(steps_since(run, 0), "the first checkpoint")

        os.kill(starts(run / "logs")[-1]["pid"], signal.SIGKILL)  # of either host
        until(steps_since(run, 1), "a start after a worker was killed")
        assert partner(run / "logs") == "hostb"

        start("hostc")  # has no place, and waits
        hosts.cut_off("hostb")
        hosts.kill("hostb")
        until(steps_since(run, 2), "a start after a host was lost")
        spare = partner(run / "logs")
        assert spare == "hostc"

        hosts.kill(spare)
        assert hosts.processes["hosta"].wait(PATIENCE) == 0, (tmp_path / "hosta.out").read_text()

    text = (run / "logs" / "rank_00000.log").read_text()
    assert "elastic: fewer processes than before, data-parallel size 2 -> 1; the batch is the same" in text
    assert text.count("resuming from ") >= 3
    run_world(
        2,
        undisturbed,
        settings.model_copy(update={"training": settings.training.model_copy(update={"run_dir": tmp_path / "whole"})}),
        free_ports(1)[0],
    )
    found, expected = rows(run), rows(tmp_path / "whole")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    shrunk = int(text.rsplit("resuming from ", 1)[1].split("step_")[1][:8])
    assert shrunk >= 3 * EVERY
    assert found[:shrunk] == expected[:shrunk]  # to the last bit as long as two ranks shared the batch
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    last = latest_checkpoint(run / "checkpoints")
    whole = latest_checkpoint(tmp_path / "whole" / "checkpoints")
    assert last is not None
    assert whole is not None
    assert json.loads((last / STATE_FILE).read_text())["data_size"] == 1
    actual, wanted = tensors(last), tensors(whole)
    for name in wanted:
        assert (actual[name] - wanted[name]).abs().max() <= 1e-3 * wanted[name].abs().max(), name
    assert read_metrics(run / METRICS_FILE)[-1]["step"] == STEPS


@pytest.mark.slow
def test_doctor_names_the_slow_host(tmp_path: Path) -> None:
    need(PROGRAMS, "iproute2 procps")
    names = ("hosta", "hostb", "hostc", "hostd")
    with Hosts(*names) as hosts:
        hosts.slow_down("hostc", megabits=100)
        for rank, name in enumerate(names):
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(names)),
                "LOCAL_RANK": "0",
                "MASTER_ADDR": hosts.address("hosta"),
                "MASTER_PORT": "29500",
                "GLOO_SOCKET_IFNAME": INTERFACE,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            }
            command = [
                sys.executable,
                "-m",
                "megatron_bert",
                "doctor",
                "--megabytes",
                "1",
                "--dir",
                str(tmp_path / "d"),
            ]
            hosts.start(name, command, tmp_path / f"{name}.out", tmp_path, **variables)
        codes = [hosts.processes[name].wait(PATIENCE) for name in names]
    text = (tmp_path / "hosta.out").read_text()
    assert codes == [0] * len(names), text
    assert "warning links         hostc is slow: " in text
    assert "(6 of 6 pairs of hosts" in text
    assert "ok      clocks        within " in text
    assert f"{tmp_path / 'd'} is shared" in text
    assert (tmp_path / "hostb.out").read_text().count("\n") <= 2  # rank 0 alone reports
    assert list((tmp_path / "d").iterdir()) == []
