# SPDX-License-Identifier: Apache-2.0
"""Slow ranks are named, once, and by the work of their peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_bert.training.metrics_file import METRICS_FILE, read_metrics
from megatron_bert.training.slow_ranks import SLOW_READINGS, SlowRanks
from megatron_bert.training.trainer import Trainer
from parallel import step_clock
from tests.commands import run_ranks
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import run_settings, write_config

HOSTS = ["n0", "n0", "n1", "n1"]


def found(seconds: list[float], readings: int = SLOW_READINGS, peers: list[list[int]] | None = None) -> list[str]:
    slow = SlowRanks([[0, 1, 2, 3]] if peers is None else peers, HOSTS)
    return [note for _ in range(readings) for note in slow.notes(seconds)]


def test_a_slow_rank_is_named_once() -> None:
    assert found([1.0, 1.0, 2.0, 1.1], readings=10) == [
        "rank 2 on n1 is slow: 2 s of work a step, the median of ranks with the same work 1 s; all the others wait for "
        "it, so look at that host"
    ]


@pytest.mark.parametrize("seconds", [[1.0, 1.2, 1.4, 1.1], [0.001, 0.001, 0.009, 0.001]], ids=["a little", "noise"])
def test_others_are_not(seconds: list[float]) -> None:
    assert found(seconds, readings=10) == []


def test_a_moment_is_no_reason() -> None:
    assert found([1.0, 1.0, 2.0, 1.0], readings=SLOW_READINGS - 1) == []


def test_ranks_are_compared_with_those_of_their_stage() -> None:
    assert found([1.0, 1.0, 4.0, 4.0], peers=[[0, 1], [2, 3]]) == []
    assert [note[:13] for note in found([1.0, 1.0, 4.0, 7.0], peers=[[0, 1], [2, 3]])] == ["rank 3 on n1 "]


def own_time() -> None:
    """Let time go by only where a rank computes: an hour a forward pass on rank 1, a minute on the others."""
    hours = 0.0
    step_clock.perf_counter = lambda: hours
    original = Trainer.train_step

    def train_step(self: Trainer, *args: Any) -> Any:
        def pass_time(*_: Any) -> None:
            nonlocal hours
            hours += 1.0 if dist.get_rank() == 1 else 1 / 60

        handles = [stage.register_forward_pre_hook(pass_time) for stage in self.model.stages.values()]
        sums = original(self, *args)
        for handle in handles:
            handle.remove()
        return sums

    Trainer.train_step = train_step  # type: ignore[method-assign]


def test_metrics_of_a_run(tmp_path: Path) -> None:
    make_data(tmp_path)
    settings = run_settings(tmp_path, tmp_path / "run", parallel__data=2)
    config = write_config(settings, tmp_path / "config.yaml")
    ended = run_ranks(2, "pretrain", str(config), folder=tmp_path, before=own_time)
    assert [rank.code for rank in ended] == [0, 0], ended
    rows = [row for row in read_metrics(tmp_path / "run" / METRICS_FILE) if "loss" in row]
    for row in rows:
        assert row["step_seconds_min"] == pytest.approx(1 / 60)
        assert row["step_seconds_max"] == pytest.approx(1.0)
        assert row["step_seconds_median"] == pytest.approx((1 + 1 / 60) / 2)
        assert row["slowest_rank"] == 1
    assert ended[0].text.count("note: rank 1 on ") == 1


def test_one_rank_has_no_others(tmp_path: Path) -> None:
    from megatron_bert.training.pretrain import pretrain

    make_data(tmp_path)
    torch.set_num_threads(1)
    pretrain(run_settings(tmp_path, tmp_path / "run", training__steps=3))
    assert all("slowest_rank" not in row for row in read_metrics(tmp_path / "run" / METRICS_FILE))
