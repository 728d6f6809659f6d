# SPDX-License-Identifier: Apache-2.0
"""A rank that stands still in the middle of a step of the real command is named by the others, and by `failures`."""

from __future__ import annotations

import json
import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_bert.launching.failures import summary
from megatron_bert.launching.launched import LOG_VARIABLE
from megatron_bert.launching.records import rank_file
from megatron_bert.training.heartbeat import HEARTBEAT_FILE
from megatron_bert.training.trainer import Trainer
from parallel import presence
from parallel.checkpoint_writer import CheckpointWriter
from tests.commands import run_ranks
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import run_settings, write_config


def stand_still(owner: type, name: str, rank: int, step: int) -> None:
    """Let a rank stop, like one whose host is swapping or suspended, in the middle of a step or of its checkpoint."""
    presence.ANSWER_SECONDS = 1.5
    original = getattr(owner, name)

    def stopping(self: Any, *args: Any) -> Any:
        if steps["done"] >= step and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(self, *args)

    steps = {"done": 0}
    finish = Trainer._finish_gradients

    def counting(self: Trainer, *args: Any) -> Any:
        steps["done"] = self.step + 1
        return (stopping if owner is Trainer else finish)(self, *args)

    setattr(owner, name, stopping)
    Trainer._finish_gradients = counting  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("where", "done", "sign"),
    [
        ((Trainer, "_finish_gradients"), 2, "step 3"),
        ((CheckpointWriter, "_plan_for"), 3, "the checkpoint of step 3"),
    ],
    ids=["step", "save"],
)
def test_a_rank_that_stands_still_is_named(tmp_path: Path, where: tuple[type, str], done: int, sign: str) -> None:
    make_data(tmp_path)
    settings = run_settings(
        tmp_path, tmp_path / "run", parallel__data=2, parallel__timeout_seconds=4.0, checkpoint__every=3
    )
    config = write_config(settings, tmp_path / "config.yaml")
    logs = tmp_path / "logs"
    ended = run_ranks(
        2,
        "pretrain",
        str(config),
        folder=tmp_path,
        before=partial(stand_still, *where, 1, 3),
        **{LOG_VARIABLE: str(logs)},
    )
    assert [rank.code for rank in ended] == [1, -signal.SIGKILL]
    sentence = (
        rf"rank 1 on \S+ \(process \d+\) does not answer, and gave its last sign \d+ s ago, at {sign}, while others "
        r"waited 4 s \(parallel.timeout_seconds\): see its log \(rank 1\) and host; the same command goes on from the "
        r"newest checkpoint"
    )
    log = rank_file(logs, 0, "log").read_text()
    assert re.search(f"LostRankError: {sentence}", log), log
    assert "most recent call first" in log, "the stacks of a rank that waits"
    said = summary(logs)
    assert re.match(r"ended silently \(.*\): rank 1 on ", said), said
    assert re.search(rf"rank 0 on \S+ \(process \d+\) at .*: LostRankError: {sentence}", said), said
    heartbeat = json.loads((tmp_path / "run" / HEARTBEAT_FILE).read_text())
    assert (heartbeat["state"], heartbeat["step"]) == ("failed", done)
