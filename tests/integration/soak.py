# SPDX-License-Identifier: Apache-2.0
"""Kills of random ranks at random moments, and what is left of them in the end: nothing.

    python -m tests.integration.soak --kills 100 [--way torchrun|node|hosts|slurm] [--seed N] [--folder DIR]

A run of two ranks, with loader processes, is started once in each documented way, and its ranks are killed (KILL, ABRT,
SEGV) or stopped (STOP, so that they hang) while it starts, trains and saves. Its launcher starts it again until it is
done. Then its weights and optimizer states, its rows of metrics.jsonl and its TensorBoard values must be those of a run
that nobody disturbed, to the last bit, and no process, file or shared memory may be left over. Hosts and Slurm need
root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_bert.config import Settings
from megatron_bert.launching.launched import LOG_VARIABLE
from megatron_bert.launching.records import read_starts
from parallel.checkpoint import latest_checkpoint
from parallel.errors import UserError
from tests.integration.hosts import INTERFACE, Hosts
from tests.integration.slurm_cluster import free_ports
from tests.integration.slurm_runs import Session, undisturbed
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import TIMED, assert_same_checkpoint, rows, run_settings, write_config
from tests.pictures import WITHOUT_PICTURES
from tests.worlds import run_world

ROOT = Path(__file__).resolve().parents[2]
WAYS = ("torchrun", "node", "hosts", "slurm")
RANKS = 2
#: Seconds that a start, or the end of the run, may take.
PATIENCE = 300.0
PACE, EVERY = 0.1, 3
SIGNALS = (signal.SIGKILL,) * 4 + (signal.SIGABRT,) * 3 + (signal.SIGSEGV,) * 2 + (signal.SIGSTOP,)
SHARED_MEMORY = Path("/dev/shm")
#: Environment variable by which every process of a soak is known.
MARK = "SOAK_FOLDER"


def prepare(folder: Path, kills: int) -> Settings:
    """Settings of the run in a folder, with its data."""
    make_data(folder)
    return run_settings(
        folder,
        folder / "run",
        training__steps=14 * kills + 20,
        checkpoint__every=EVERY,
        parallel__data=None,
        parallel__timeout_seconds=10,
        checkpoint__timeout_seconds=20,
        logging__tensorboard=True,
    )


def run_undisturbed(folder: Path, kills: int) -> None:
    """What all soaks with as many kills are compared with: the run in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = prepare(folder, kills)
    run_world(RANKS, undisturbed, settings, free_ports(1)[0], timeout=PATIENCE)


def soak(way: str, kills: int, folder: Path, whole: Path, seed: int = 1, loaders: int = 1) -> dict[str, Any]:
    """Start a run, disturb it, and compare it with another.

    Args:
        way: of :data:`WAYS`.
        kills: how many.
        folder: for everything; must not exist.
        whole: what :func:`run_undisturbed` was given.
        seed: of what is killed when.
        loaders: loader processes of each rank.

    Returns:
        What was done: the number of each signal, of starts, and seconds.

    Raises:
        AssertionError: the run did not recover, or anything of it differs or is left.
    """
    folder.mkdir(parents=True)
    settings = prepare(folder, kills)
    data = settings.data.model_copy(update={"workers": loaders})  # none in ranks of a test's world
    write_config(settings.model_copy(update={"data": data}), folder / "settings.yaml")
    before, began = set(SHARED_MEMORY.iterdir()), time.monotonic()
    variables = {
        "PYTHONPATH": WITHOUT_PICTURES,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PACE": str(PACE),
        MARK: str(folder),
    }
    with _STARTERS[way](folder, variables) as run:
        killer = _Killer(run, folder, seed)
        for _ in range(kills):
            killer.kill_one()
        run.wait()
        starts = len(read_starts(run.logs))
    _assert_nothing_left(folder, killer.pids, before)
    _assert_same(folder / "run", whole / "run")
    return {"way": way, **killer.sent, "starts": starts, "seconds": round(time.monotonic() - began, 1)}


class _Run:
    """A launched run.

    Args:
        logs: its log directory.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs

    def ended(self) -> bool:
        raise NotImplementedError

    def wait(self) -> None:
        """Until the run is done.

        Raises:
            AssertionError: it failed, or takes too long.
        """
        raise NotImplementedError


class _Launched(_Run):
    """A run by torchrun.sh, on this host or on several."""

    def __init__(self, logs: Path, processes: list[subprocess.Popen[Any]], outputs: list[Path]) -> None:
        super().__init__(logs)
        self.processes, self.outputs = processes, outputs

    def ended(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    def wait(self) -> None:
        for process, output in zip(self.processes, self.outputs, strict=True):
            assert process.wait(PATIENCE) == 0, output.read_text()


class _Submitted(_Run):
    """A run by Slurm."""

    def __init__(self, logs: Path, session: Session, number: str) -> None:
        super().__init__(logs)
        self.session, self.number = session, number

    def ended(self) -> bool:
        return self.session.job(self.number)[0]["JobState"] not in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING")

    def wait(self) -> None:
        (job,) = self.session.until_ended(self.number)
        output = "".join(path.read_text() for path in self.logs.parent.glob("slurm-*.out"))
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), output


def _command(logs: Path, *options: str) -> list[str]:
    script = ["bash", str(ROOT / "launch" / "torchrun.sh"), *options, "--restarts", "10000", "--logs", str(logs)]
    return [*script, "pretrain", "settings.yaml"]


def _by_torchrun(folder: Path, variables: dict[str, str]) -> contextlib.AbstractContextManager[_Run]:
    """By PyTorch's own program, as in the README; the variable is for the soak to find the ranks."""
    options = ["--standalone", "--nproc-per-node", str(RANKS), "--max-restarts", "10000"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *options,
        "-m",
        "megatron_bert",
        "pretrain",
        "settings.yaml",
    ]
    return _on_this_host(folder, command, variables | {LOG_VARIABLE: str(folder / "run" / "logs")})


def _on_a_node(folder: Path, variables: dict[str, str]) -> contextlib.AbstractContextManager[_Run]:
    return _on_this_host(folder, _command(folder / "run" / "logs", "--processes", str(RANKS)), variables)


@contextlib.contextmanager
def _on_this_host(folder: Path, command: list[str], variables: dict[str, str]) -> Iterator[_Run]:
    logs, output = folder / "run" / "logs", folder / "run.out"
    with output.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | variables,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield _Launched(logs, [process], [output])
    finally:
        _end(folder)
        process.wait(PATIENCE)


@contextlib.contextmanager
def _on_hosts(folder: Path, variables: dict[str, str]) -> Iterator[_Run]:
    logs = folder / "run" / "logs"
    with Hosts("hosta", "hostb") as hosts:
        head = ["--hosts", str(RANKS), "--head", f"{hosts.address('hosta')}:29500", "--interface", INTERFACE]
        variables = variables | {"RDZV_CONF": "last_call_timeout=1,keep_alive_interval=1"}
        outputs = [folder / f"{name}.out" for name in hosts.names]
        for name, output in zip(hosts.names, outputs, strict=True):
            hosts.start(name, _command(logs, "--processes", "1", *head), output, folder, **variables)
        yield _Launched(logs, list(hosts.processes.values()), outputs)


@contextlib.contextmanager
def _on_slurm(folder: Path, variables: dict[str, str]) -> Iterator[_Run]:
    with Session(folder) as session:
        site = session.site("soak", max_restarts=10_000, **variables)
        options = ["--nodes", str(RANKS), "--gpus-per-node", "1", "--style", "srun"]
        number = session.submit("run", site, *options, minutes=1000)
        yield _Submitted(folder / "run" / "logs" / f"{number}.0", session, number)


_STARTERS = {"torchrun": _by_torchrun, "node": _on_a_node, "hosts": _on_hosts, "slurm": _on_slurm}


class _Killer:
    """Sends signals to ranks.

    Args:
        run: whose ranks.
        folder: of the soak.
        seed: of what is killed when.
    """

    def __init__(self, run: _Run, folder: Path, seed: int) -> None:
        self.run, self.folder, self.random = run, folder, random.Random(seed)
        self.checkpoints = folder / "run" / "checkpoints"
        self.sent: Counter[str] = Counter()
        #: Of all ranks that were seen.
        self.pids: set[int] = set()
        self._newest: Path | None = None

    def kill_one(self) -> None:
        """Wait for a checkpoint more, or sometimes just for a start, and a moment longer; then kill a rank."""
        progress = self.random.random() < 0.8
        self._until(self._has_saved if progress else self._ranks)
        time.sleep(self.random.uniform(0.0, 2.0))
        ranks = self._until(self._ranks)
        number = self.random.choice(SIGNALS)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.random.choice(ranks), number)
            self.sent[number.name] += 1
        self._newest = latest_checkpoint(self.checkpoints)

    def _has_saved(self) -> bool:
        return latest_checkpoint(self.checkpoints) != self._newest

    def _ranks(self) -> list[int]:
        """Processes of the ranks of the last start that run."""
        try:
            last = read_starts(self.run.logs)[-1]
        except UserError:
            return []
        pids = [end.start["pid"] for end in last.ends if end.end is None]
        self.pids.update(pids)
        return [pid for pid in pids if _marked(pid, self.folder)]

    def _until(self, done: Any) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (found := done()):
            assert not self.run.ended(), f"the run ended after {sum(self.sent.values())} kills: see {self.run.logs}"
            assert time.monotonic() < deadline, f"nothing goes on after {sum(self.sent.values())} kills"
            time.sleep(0.05)
        return found


def _marked(pid: int, folder: Path) -> bool:
    try:
        return f"{MARK}={folder}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _processes(folder: Path) -> dict[int, str]:
    """What runs for a folder."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        with contextlib.suppress(OSError):
            if pid != os.getpid() and _marked(pid, folder):
                found[pid] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def _end(folder: Path) -> None:
    for pid in _processes(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _assert_nothing_left(folder: Path, pids: set[int], before: set[Path]) -> None:
    deadline = time.monotonic() + 10
    while (left := _processes(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"still running: {left}"
    mine = [path for path in set(SHARED_MEMORY.iterdir()) - before if any(f"{pid}" in path.name for pid in pids)]
    assert not mine, f"shared memory is left: {mine}"
    run = folder / "run"
    strange = [
        path for path in run.rglob("*") if any(word in path.name for word in ("partial", ".tmp", "lock", "stopped"))
    ]
    assert not strange, f"files are left: {strange}"


def _assert_same(run: Path, whole: Path) -> None:
    assert rows(run) == rows(whole), "the rows of metrics.jsonl differ"
    mine, theirs = (latest_checkpoint(path / "checkpoints") for path in (run, whole))
    assert mine is not None
    assert theirs is not None
    assert mine.name == theirs.name
    assert_same_checkpoint(mine, theirs)
    assert _scalars(run) == _scalars(whole), "the values in TensorBoard differ"


def _scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {
        tag: [(event.step, event.value) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
        if tag.split("/")[-1] not in TIMED and not tag.startswith("checkpoint/")
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="in each way (default: 100)")
    parser.add_argument("--way", choices=WAYS, action="append", help="one way; all by default")
    parser.add_argument("--seed", type=int, default=1, help="of what is killed when")
    parser.add_argument("--folder", type=Path, help="for the runs; removed at the end unless it is given")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        run_undisturbed(folder / "whole", arguments.kills)
        for way in arguments.way or WAYS:
            print(soak(way, arguments.kills, folder / way, folder / "whole", arguments.seed), flush=True)


if __name__ == "__main__":
    main()
