"""A rank that stands still in the middle of a step of the real command is named by the others, and by `failures`."""

from __future__ import annotations

import json
import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

from megatron_bert.launching.failures import summary
from megatron_bert.launching.launched import LOG_VARIABLE
from megatron_bert.launching.records import rank_file
from megatron_bert.training.heartbeat import HEARTBEAT_FILE
from megatron_bert.training.trainer import Trainer
from parallel import presence
from tests.commands import run_ranks
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import run_settings, write_config


def stand_still(rank: int, step: int) -> None:
    """Let a rank stop, like one whose host is swapping or suspended, in the middle of a step."""
    presence.ANSWER_SECONDS = 1.5
    original = Trainer._finish_gradients

    def finish(self: Trainer, *args: Any) -> Any:
        if self.step == step - 1 and self.world.rank == rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(self, *args)

    Trainer._finish_gradients = finish  # type: ignore[method-assign]


def test_a_rank_that_stands_still_is_named(tmp_path: Path) -> None:
    make_data(tmp_path)
    settings = run_settings(tmp_path, tmp_path / "run", parallel__data=2, parallel__timeout_seconds=6.0)
    config = write_config(settings, tmp_path / "config.yaml")
    logs = tmp_path / "logs"
    ended = run_ranks(
        2, "pretrain", str(config), folder=tmp_path, before=partial(stand_still, 1, 3), **{LOG_VARIABLE: str(logs)}
    )
    assert [rank.code for rank in ended] == [1, -signal.SIGKILL]
    sentence = (
        r"rank 1 on \S+ \(process \d+\) does not answer, and gave its last sign \d+ s ago, at step 3, while others "
        r"waited 6 s \(parallel.timeout_seconds\): see its log \(rank 1\) and host; the same command goes on from the "
        r"newest checkpoint"
    )
    log = rank_file(logs, 0, "log").read_text()
    assert re.search(f"LostRankError: {sentence}", log), log
    assert "most recent call first" in log, "the stacks of a rank that waits"
    said = summary(logs)
    assert re.match(r"ended without a word \(.*\): rank 1 on ", said), said
    assert re.search(rf"rank 0 on \S+ \(process \d+\) at .*: LostRankError: {sentence}", said), said
    heartbeat = json.loads((tmp_path / "run" / HEARTBEAT_FILE).read_text())
    assert (heartbeat["state"], heartbeat["step"]) == ("failed", 2)
