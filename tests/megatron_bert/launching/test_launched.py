# SPDX-License-Identifier: Apache-2.0
"""Log files and records of ranks, and the failure they are summed up to."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.cli import main
from megatron_bert.launching.failures import summary
from megatron_bert.launching.launched import LOG_VARIABLE
from megatron_bert.launching.records import Record, rank_file, read_starts
from megatron_bert.launching.slurm_environment import adopt_slurm, first_node, meeting_port


def run_rank(folder: Path, body: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process that does something as a rank of a run."""
    program = "import os\nfrom megatron_bert.launching.launched import launched_process\nwith launched_process():\n"
    return subprocess.run(
        [sys.executable, "-c", program + textwrap.indent(body, "    ")],
        env={**os.environ, LOG_VARIABLE: str(folder), **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_rank_0_is_on_the_console_and_in_its_file(tmp_path: Path) -> None:
    done = run_rank(tmp_path / "logs", "print('loss 1')\nos.write(2, b'native\\n')\nos.system('echo child')", RANK="0")
    assert done.returncode == 0
    assert done.stdout == "loss 1\nnative\nchild\n" == rank_file(tmp_path / "logs", 0, "log").read_text()
    assert [event["event"] for event in events(tmp_path / "logs", 0)] == ["started", "ended"]


def test_other_ranks_are_in_their_files(tmp_path: Path) -> None:
    done = run_rank(tmp_path, "print('one')\nraise ArithmeticError('broken here')", RANK="3", WORLD_SIZE="4")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    log = rank_file(tmp_path, 3, "log").read_text()
    assert log.startswith("one\nTraceback")
    assert log.endswith("ArithmeticError: broken here\n")
    started, failed = events(tmp_path, 3)
    assert (started["size"], failed["event"], failed["error"]) == (4, "failed", "ArithmeticError")


def test_crash_of_native_code_shows_where_python_was(tmp_path: Path) -> None:
    done = run_rank(tmp_path, "import ctypes\nctypes.string_at(0)", RANK="0")
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in rank_file(tmp_path, 0, "log").read_text()
    text = summary(tmp_path)
    assert text.startswith("ended silently (killed, out of memory, or the host is gone): rank 0 on ")
    assert "ctypes" in text


def test_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_rank(tmp_path / "file", "pass")
    assert "which cannot be written" in done.stderr


def events(folder: Path, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rank_file(folder, rank, "jsonl").read_text().splitlines()]


class Records:
    """A directory with records of made-up ranks."""

    def __init__(self, folder: Path, size: int, start: float = 1e9) -> None:
        self.folder, self.size, self.start = folder, size, start
        for rank in range(size):
            self.write(rank, "started", start, size=size)

    def write(self, rank: int, event: str, time: float, **details: Any) -> None:
        line = {"event": event, "rank": rank, "host": f"n{rank // 2}", "pid": 100 + rank, "time": time}
        with rank_file(self.folder, rank, "jsonl").open("a") as file:
            file.write(json.dumps(line | details) + "\n")

    def fail(
        self, rank: int, after: float, error: str, message: str, cause: str = "", words: str = "", **more: Any
    ) -> None:
        cause, words = cause or error, words or message
        details = {"error": error, "message": message, "cause": cause, "cause_message": words, "place": "f.py:3 in g"}
        self.write(rank, "failed", self.start + after, **details, **more)


class TestSummary:
    def test_first_error_is_not_that_of_the_ranks_it_took_along(self, tmp_path: Path) -> None:
        records = Records(tmp_path, 8)
        for rank in (0, 1, 2, 4, 6, 7):
            # Seen a little earlier than the cause: clocks of hosts differ.
            words = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:1234"
            records.fail(rank, 9.9, "PipelineError", "pipeline rank 0 failed", "RuntimeError", words)
        records.fail(5, 10.0, "OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB\nand more")
        text = summary(tmp_path)
        assert text.startswith("failed first: rank 5 on n2 (process 105) at ")
        assert "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n" in text
        assert "and more" not in text
        assert f"its log: {rank_file(tmp_path, 5, 'log')}" in text
        assert "lost the connection after it: ranks 0-2, 4, 6-7 on n0, n1, n2, n3" in text
        assert "ended silently: rank 3 on n1" in text

    def test_rank_that_was_killed(self, tmp_path: Path) -> None:
        records = Records(tmp_path, 4)
        for rank in (0, 1, 3):
            records.fail(rank, 5, "DistBackendError", "NCCL error: remote process exited")
        rank_file(tmp_path, 2, "log").write_text("step 7\n\nlast words\n")
        text = summary(tmp_path)
        assert text.startswith("ended silently (killed, out of memory, or the host is gone): rank 2 on n1;")
        assert text.splitlines()[2:4] == ["    step 7", "    last words"]
        assert "lost the connection after it: ranks 0-1, 3 on n0, n1" in text

    def test_mistake_of_the_user_once(self, tmp_path: Path) -> None:
        records = Records(tmp_path, 4)
        for rank in range(4):
            records.fail(rank, rank, "UserError", "no corpus")
        text = summary(tmp_path)
        assert text.count("no corpus") == 1
        assert "the same error on ranks 1-3" in text

    def test_only_the_last_start_counts(self, tmp_path: Path) -> None:
        Records(tmp_path, 4).fail(3, 1, "ArithmeticError", "of old")
        later = Records(tmp_path, 2, start=1e9 + 1000)
        later.write(0, "ended", 1e9 + 2000)
        later.write(1, "ended", 1e9 + 2000)
        first, last = summary(tmp_path).splitlines()
        assert re.match(r"start 1 of 2 at .*: failed first: rank 3 on n1 .* ArithmeticError: of old$", first)
        assert last == "no rank of the last start failed (2 ranks)"

    def test_only_connections_were_lost(self, tmp_path: Path) -> None:
        records = Records(tmp_path, 2)
        records.fail(0, 2, "RuntimeError", "Timed out waiting 600000ms for recv operation to complete")
        records.fail(1, 1, "RuntimeError", "Connection reset by peer")
        assert summary(tmp_path).startswith("failed first: rank 1 on n0")

    def test_port_that_is_taken(self, tmp_path: Path) -> None:
        records = Records(tmp_path, 2)
        records.fail(0, 2, "DistNetworkError", "The server socket has failed to listen: EADDRINUSE")
        records.fail(1, 1, "DistNetworkError", "Connection reset by peer")
        assert summary(tmp_path).startswith("failed first: rank 0 on n0")

    def test_what_another_rank_could_not_do(self, tmp_path: Path) -> None:
        """Rank 0 reports what went wrong on rank 1, before that rank does."""
        records = Records(tmp_path, 3)
        for rank, after in ((0, 1.0), (1, 1.5), (2, 1.2)):
            records.fail(rank, after, "UserError", "the checkpoint cannot be written", ranks=[1])
        text = summary(tmp_path)
        assert text.startswith("failed first: rank 1 on n0 (process 101)")
        assert "the same error on ranks 0, 2" in text

    def test_every_start_is_kept(self, tmp_path: Path) -> None:
        for number in range(3):
            records = Records(tmp_path, 2, start=1e9 + 10 * number)
            records.fail(number % 2, 1, "ArithmeticError", f"failure {number}")
        lines = summary(tmp_path).splitlines()
        assert [line.rsplit(" ", 2)[1:] for line in lines[:2]] == [["failure", "0"], ["failure", "1"]]
        assert lines[2].startswith("failed first: rank 0")
        assert lines[2].endswith("failure 2")

    @pytest.mark.parametrize(
        "damage",
        [
            b"{",
            b"null\n[]\n1\n",
            b'{"event": "started", "rank": "0"}\n',
            b"\xff\xfe\x00\n",
            b'{"event": ["a"]}\n',
            b"[" * 9999,
        ],
        ids=["cut", "other", "kinds", "bytes", "event", "deep"],
    )
    def test_damaged_records(self, tmp_path: Path, damage: bytes) -> None:
        Records(tmp_path, 2).fail(1, 1, "ArithmeticError", "found all the same")
        for rank in (0, 1, 7):
            with rank_file(tmp_path, rank, "jsonl").open("ab") as file:
                file.write(damage)
        assert "rank 1 on n0 (process 101)" in summary(tmp_path).splitlines()[0]

    def test_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["failures", str(tmp_path)]) == 2
        assert "holds no records of ranks" in capsys.readouterr().err
        Records(tmp_path, 1).fail(0, 0, "ValueError", "wrong")
        assert main(["failures", str(tmp_path), "--check-retry"]) == 0
        assert "ValueError: wrong" in capsys.readouterr().out

    def test_what_another_start_cannot_help(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def fail(number: int, error: str, step: int) -> int:
            records = Records(tmp_path, 2, start=1e9 + 10 * number)
            records.fail(0, 1, "DistBackendError", "Connection closed by peer")
            records.fail(1, 2, error, "wrong", notes=[f"in step {step}"])
            return main(["failures", str(tmp_path), "--check-retry"])

        assert [fail(0, "ArithmeticError", 7), fail(1, "ArithmeticError", 8)] == [0, 0]
        assert fail(2, "ArithmeticError", 8) == 4
        assert "another start would not help: the start before it failed in the same way" in capsys.readouterr().out
        assert fail(3, "RuntimeError", 8) == 0
        assert fail(4, "UserError", 8) == 3
        assert "it was refused" in capsys.readouterr().out

    def test_lost_connections_are_no_reason_to_give_up(self, tmp_path: Path) -> None:
        for number in range(3):
            Records(tmp_path, 2, start=1e9 + 10 * number).fail(0, 1, "DistBackendError", "Connection closed by peer")
        assert main(["failures", str(tmp_path), "--check-retry"]) == 0


def test_times_are_those_of_the_shared_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts whose clocks are hours apart agree on the order of their failures."""
    for rank, ahead in ((0, 7200.0), (1, -7200.0)):
        monkeypatch.setattr(time, "time", lambda ahead=ahead: 1e9 + ahead)
        Record(tmp_path, rank).write("started", size=2)
    for rank in (1, 0):
        Record(tmp_path, rank).failed(ArithmeticError(f"on rank {rank}"))
    (start,) = read_starts(tmp_path)
    assert [end.rank for end in start.failed] == [1, 0]


STEP = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "localhost,n[2-4]",
    "SLURM_JOB_ID": "77",
    "SLURM_RESTART_COUNT": "2",
}


class TestSlurm:
    def test_task_of_several(self) -> None:
        environment = dict(STEP)
        adopt_slurm(environment)
        assert {name: environment[name] for name in environment if not name.startswith("SLURM")} == {
            "RANK": "5",
            "WORLD_SIZE": "8",
            "LOCAL_RANK": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(20000 + 77 * 16 + 2),
        }

    def test_meeting_point_may_be_given(self) -> None:
        environment = {**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
        adopt_slurm(environment)
        assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "1")

    @pytest.mark.parametrize("other", [{"RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"WORLD_SIZE": "2"}])
    def test_other_launchers_and_single_tasks(self, other: dict[str, str]) -> None:
        environment = {**STEP, **other}
        adopt_slurm(environment)
        assert environment == {**STEP, **other}

    @pytest.mark.parametrize(
        ("nodes", "first"), [("n1", "n1"), ("gpu[003-007,012],cpu1", "gpu003"), ("a[1,3]-ib", "a1-ib"), ("x,y", "x")]
    )
    def test_first_node(self, nodes: str, first: str) -> None:
        assert first_node(nodes) == first

    def test_ports(self) -> None:
        ports = [meeting_port(job, restarts) for job in range(100, 850) for restarts in range(16)]
        assert len(set(ports)) == len(ports)
        assert min(ports) > 1024
        assert max(ports) < 32768
