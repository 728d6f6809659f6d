# SPDX-License-Identifier: Apache-2.0
"""Ranks that are missing are named by those that wait for them, and every rank prints its stacks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel import presence
from parallel.errors import UserError
from parallel.hosts import host_name
from parallel.presence import LostRankError, Presence, _gone, comes_from_others, sign
from tests.worlds import run_world

#: Of a collective in these worlds.
SECONDS = 1.0


def _one_is_missing(folder: Path, how: str) -> tuple[str, list[int], str]:
    """Rank 1 does not come to a collective: what this rank's error says, whom it names, and what it printed."""
    presence.POLL_SECONDS, presence.ANSWER_SECONDS = 0.1, 2.0
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    output = folder / f"rank_{rank}"
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)
    group = dist.new_group(timeout=timedelta(seconds=SECONDS))
    dist.barrier()
    try:
        with Presence(store, rank, 3, SECONDS):
            sign("step 5")
            if rank == 1:
                _stay_away(how, store)
            dist.all_reduce(torch.ones(1), group=group)
    except Exception as error:
        return str(error), getattr(error, "ranks", []), output.read_text()
    raise AssertionError("nobody was missing")


def _stay_away(how: str, store: dist.Store) -> None:
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "fails":
        raise UserError("this rank has no data")
    while not store.check(["presence/verdict"]):
        time.sleep(0.05)


def test_a_busy_rank_is_named_with_the_place_and_all_print_their_stacks(tmp_path: Path) -> None:
    for rank, (said, ranks, printed) in enumerate(run_world(3, _one_is_missing, tmp_path, "busy")):
        assert "most recent call first" in printed
        if rank == 1:
            assert "in _stay_away" in printed
            continue
        assert ranks == [1]
        assert re.match(
            r"rank 1 on \S+ \(process \d+\) is busy at parallel/test_presence.py:\d+ in _stay_away "
            r"and gave its last sign \d+ s ago, at step 5, while others waited 1 s \(timeout_seconds\): see "
            r"its log \(rank 1\) and host; the same command goes on",
            said,
        )


def test_of_busy_ranks_those_that_are_behind_are_named() -> None:
    store = dist.HashStore()
    mine = Presence(store, 0, 3, SECONDS)
    signs = {rank: {"host": "n", "pid": 1, "time": 0.0, "what": "step 5", "count": 7 - rank // 2} for rank in range(3)}
    busy = {"busy": "trainer.py:1 in _log"}
    ranks, _ = mine._judge({0: {"others": True, "late": True}}, {1: busy, 2: busy}, signs)
    assert ranks == [2]


def test_a_rank_that_fails_is_named_with_its_error(tmp_path: Path) -> None:
    results = run_world(3, _one_is_missing, tmp_path, "fails")
    assert results[1][:2] == ("this rank has no data", [])
    for rank in (0, 2):
        said, ranks, _ = results[rank]
        assert ranks == [1]
        assert re.match(r"rank 1 on \S+ \(process \d+\) failed \(this rank has no data\)", said)


def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    with pytest.raises(LostRankError, match=r"rank 1 on \S+ \(process \d+\) does not answer, and gave its last sign"):
        run_world(3, _raised, tmp_path)


def test_a_rank_that_has_died_is_not_waited_for() -> None:
    mine = Presence(dist.HashStore(), 0, 2, SECONDS)
    with subprocess.Popen(["true"]) as process:
        while not _gone({"host": host_name(), "pid": process.pid}):  # a zombie: nobody has waited for it
            time.sleep(0.01)
        signs = {
            rank: {"host": host_name(), "pid": pid, "time": 0.0, "what": "step 5", "count": 7}
            for rank, pid in enumerate((os.getpid(), process.pid))
        }
        ranks, says = mine._judge({0: {"others": True, "late": False}}, {}, signs)
    assert ranks == [1]
    assert "has died, and gave its last sign" in says
    assert _gone(signs[1]), "nor is one whose process is not there"
    assert not _gone(signs[0])
    assert not _gone(signs[1] | {"host": "another"})


def _raised(folder: Path) -> None:
    said, ranks, _ = _one_is_missing(folder, "stopped")
    raise LostRankError(said, ranks)


def test_a_sign_without_a_world_is_nothing() -> None:
    sign("step 1")


@pytest.mark.parametrize(
    ("kind", "message", "expected"),
    [
        ("RuntimeError", "Timed out waiting 12000ms for recv operation to complete", True),
        ("RuntimeError", "Connection closed by peer [127.0.0.1]:4711", True),
        ("DistBackendError", "anything", True),
        ("RuntimeError", "CUDA error: an illegal memory access was encountered", False),
        ("DistNetworkError", "The server socket has failed to bind: EADDRINUSE", False),
        ("KeyError", "'timeout'", False),
    ],
)
def test_errors_that_come_from_others(kind: str, message: str, expected: bool) -> None:
    assert comes_from_others(kind, message) == expected
