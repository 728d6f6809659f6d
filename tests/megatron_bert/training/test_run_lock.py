# SPDX-License-Identifier: Apache-2.0
"""One process at a time trains in a run directory."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.training import run_lock
from megatron_bert.training.pretrain import pretrain
from megatron_bert.training.run_lock import LOCK_FILE, Owner, RunLock, check_run_dir
from megatron_bert.training.trainer import Trainer
from parallel.checkpoint import whole_checkpoints
from parallel.errors import UserError
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import STEPS, rows, run_settings


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (
        ("RENEWAL_SECONDS", 0.02),
        ("STALE_SECONDS", 0.6),
        ("GRACE_SECONDS", 0.1),
        ("RESTART_SECONDS", 20.0),
        ("_POLL_SECONDS", 0.01),
    ):
        monkeypatch.setattr(run_lock, name, seconds)
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)


def left_by(run_dir: Path, **changes: Any) -> Owner:
    """A lock in a directory, like this process's but for the changes."""
    run_dir.mkdir(exist_ok=True)
    owner = replace(Owner.this_process(), **changes)
    (run_dir / LOCK_FILE).write_text(json.dumps(asdict(owner)), encoding="utf-8")
    return owner


def in_the_past(run_dir: Path) -> None:
    os.utime(run_dir / LOCK_FILE, (1e9, 1e9))


def take(run_dir: Path, **changes: Any) -> RunLock:
    lock = RunLock(run_dir, **changes)
    lock.acquire()
    return lock


def test_acquired_renewed_and_released(tmp_path: Path) -> None:
    lock = take(tmp_path / "run")
    in_the_past(tmp_path / "run")
    lock.verify()
    assert (tmp_path / "run" / LOCK_FILE).stat().st_mtime > 1.1e9
    assert Owner.from_json((tmp_path / "run" / LOCK_FILE).read_text(encoding="utf-8")).pid == os.getpid()
    lock.release()
    assert not (tmp_path / "run").exists(), "nothing came of it"


class TestOnTheSameMachine:
    def test_a_living_process_is_named(self, tmp_path: Path, child: int) -> None:
        owner = left_by(tmp_path, pid=child, started=run_lock.process_start(child), host="node7")
        in_the_past(tmp_path)  # its lock need not be renewed
        with pytest.raises(UserError, match=rf"{tmp_path}, where process {child} on node7 is training: wait for it"):
            take(tmp_path)
        assert Owner.from_json((tmp_path / LOCK_FILE).read_text(encoding="utf-8")) == owner

    def test_a_killed_process_leaves_a_lock_that_counts_no_more(self, tmp_path: Path, child: int) -> None:
        left_by(tmp_path, pid=child, started=run_lock.process_start(child))
        os.kill(child, signal.SIGKILL)  # and not waited for: a zombie
        take(tmp_path).release()

    def test_a_number_that_another_process_has_now(self, tmp_path: Path, child: int) -> None:
        left_by(tmp_path, pid=child, started=1)
        take(tmp_path).release()

    def test_a_restart_waits_for_the_processes_before_it(
        self, tmp_path: Path, child: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RANK", "0")
        left_by(tmp_path, pid=child, started=run_lock.process_start(child))
        timer = threading.Timer(0.3, os.kill, (child, signal.SIGKILL))
        timer.start()
        take(tmp_path, patience=20.0).release()


class TestOnAnotherMachine:
    def test_a_renewed_lock_is_refused(self, tmp_path: Path) -> None:
        left_by(tmp_path, machine="elsewhere", pid=12, host="node7")
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(0.02):
                os.utime(tmp_path / LOCK_FILE)

        thread = threading.Thread(target=renew)
        thread.start()
        try:
            with pytest.raises(UserError, match="process 12 on node7 is training"):
                take(tmp_path)
        finally:
            ended.set()
            thread.join()

    @pytest.mark.parametrize("ahead", [0.0, 1e6])
    def test_one_that_is_no_longer_renewed_is_taken_over(
        self, tmp_path: Path, ahead: float, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """However far apart the clocks are."""
        left_by(tmp_path, machine="elsewhere", pid=12, host="node7")
        if ahead:
            os.utime(tmp_path / LOCK_FILE, (2e9 + ahead, 2e9 + ahead))
        take(tmp_path).release()
        assert "waiting: process 12 on node7 may still train" in capsys.readouterr().out

    def test_an_old_one_is_taken_over_at_once(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        left_by(tmp_path, machine="elsewhere")
        in_the_past(tmp_path)
        take(tmp_path).release()
        assert capsys.readouterr().out == ""
        assert list(tmp_path.iterdir()) == []

    def test_no_time_to_find_out(self, tmp_path: Path) -> None:
        left_by(tmp_path, machine="elsewhere")
        with pytest.raises(UserError, match="or try again in"):
            take(tmp_path, patience=0.05)

    @pytest.mark.parametrize(
        ("names", "numbers", "free"),
        [
            (("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), (0, 1), True),
            (("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), (1, 1), False),
            (("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"), (0, 2), True),
        ],
    )
    @pytest.mark.parametrize("where", [{"machine": "elsewhere"}, {}], ids=["elsewhere", "here"])
    def test_a_new_start_of_the_same_job(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        names: tuple[str, str],
        numbers: tuple[int, int],
        free: bool,
        where: dict[str, Any],
    ) -> None:
        monkeypatch.setenv(names[0], "4711")
        monkeypatch.setenv(names[1], str(numbers[0]))
        left_by(tmp_path, **where)
        monkeypatch.setenv(names[1], str(numbers[1]))
        if free:
            take(tmp_path, patience=0.0).release()
        else:
            with pytest.raises(UserError):
                take(tmp_path, patience=0.0)

    def test_another_launch_of_the_same_name_takes_nothing_over(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was refused, and its launcher has started it again."""
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "megatron-bert")
        monkeypatch.setenv("MASTER_ADDR", "node1")
        left_by(tmp_path, machine="elsewhere")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        monkeypatch.setenv("MASTER_ADDR", "node2")
        with pytest.raises(UserError):
            take(tmp_path, patience=0.0)


def test_a_damaged_lock_counts_as_long_as_it_is_new(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="an unknown process is training"):
        take(tmp_path, patience=0.0)
    in_the_past(tmp_path)
    take(tmp_path).release()


def test_the_owner_notices_what_became_of_its_lock(tmp_path: Path) -> None:
    lock = take(tmp_path)
    (tmp_path / LOCK_FILE).unlink()  # by hand
    lock.verify()
    assert (tmp_path / LOCK_FILE).is_file()
    left_by(tmp_path, pid=12, host="node7")
    with pytest.raises(UserError, match=r"taken over by process 12 on node7, .* stopped without writing anything more"):
        lock.verify()
    lock.release()
    assert (tmp_path / LOCK_FILE).is_file(), "it is the other's"


def test_only_one_of_many_takes_a_lock_that_is_left(tmp_path: Path) -> None:
    left_by(tmp_path, pid=2**22 + 1)
    taken: list[RunLock] = []

    def compete() -> None:
        with suppress(UserError):
            taken.append(take(tmp_path))

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = taken
    winner.verify()
    winner.release()


def test_pretraining_owns_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second start is refused and changes nothing; a run whose directory was taken over writes no checkpoint."""
    make_data(tmp_path)
    run = tmp_path / "run"
    settings = run_settings(tmp_path, run, checkpoint__every=2)
    original, seen = Trainer.train_step, []

    def train_step(self: Trainer, *args: Any) -> Any:
        if self.step == 3:
            before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
            context = multiprocessing.get_context("fork")
            here, there = context.Pipe()
            other = context.Process(target=_start_again, args=(run, there))
            other.start()
            seen.append(here.recv())
            other.join()
            assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
            left_by(run, pid=12, host="node7")
        return original(self, *args)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(run_lock, "RENEWAL_SECONDS", 600.0)
    with pytest.raises(UserError, match="taken over by process 12 on node7"):
        pretrain(settings)
    assert seen == [
        f"training.run_dir is {run}, where process {os.getpid()} on {run_lock.host_name()} is training: "
        "wait for it or stop it; or set another training.run_dir"
    ]
    assert list(whole_checkpoints(run / "checkpoints")) == [2]
    (run / LOCK_FILE).unlink()
    monkeypatch.setattr(Trainer, "train_step", original)
    pretrain(settings)
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, STEPS + 1))
    assert not (run / LOCK_FILE).exists()


def _start_again(run: Path, end: Any) -> None:
    try:
        RunLock(run).acquire()
        end.send("acquired")
    except UserError as error:
        end.send(str(error))
    os._exit(0)


@pytest.mark.parametrize(
    "name", ["/proc/run", "/proc/run/below", "file", "file/below", "file/below/it", "link", "link/below", "n" * 300]
)
def test_a_directory_that_cannot_be_owned_is_refused_before(name: str, tmp_path: Path) -> None:
    """In the words of the lock, which would make it."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as early:
        check_run_dir(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError) as late:
        take(tmp_path / name)
    assert str(early.value) == str(late.value)
    assert "cannot be written to" in str(early.value)


def test_a_directory_that_can_be_owned_is_not_made_before(tmp_path: Path) -> None:
    for name in (".", "run", "run/below/it"):
        check_run_dir(tmp_path / name)
    assert not list(tmp_path.iterdir())
