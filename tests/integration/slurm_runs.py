# SPDX-License-Identifier: Apache-2.0
"""Runs through `megatron-bert submit` on a private Slurm, each disturbed in its own way, all in one session."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from megatron_bert.cli import main
from megatron_bert.config import Settings
from megatron_bert.training import pretrain as pretrain_module
from tests.integration.slurm_cluster import free_ports
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import run_settings, write_config
from tests.pictures import WITHOUT_PICTURES
from tests.worlds import run_world

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
HOLD_STEP = 4
NODES = 16
#: What one scenario does to its nodes must not disturb another by accident. The documented jobs need all of them.
PARTITIONS = """
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=low Nodes=n[1-4] MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=n[1-4] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=steady Nodes=n[5-8] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=fragile Nodes=n[9-12] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
#: Seconds that anything may take.
PATIENCE = 300.0
#: Batch scripts of the documentation, and how many nodes they take.
DOCUMENTED = {"bert_345m_1x8": 1, "bert_1.3b_4x8": 4, "bert_3.9b_16x8": 16}


class Session:
    """A running cluster, and a folder for the runs.

    Args:
        folder: exists; holds data, settings files and run directories.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        #: All jobs, and when Slurm was asked for them: each question starts a program, and many scenarios wait.
        self.jobs: list[dict[str, str]] = []
        self.asked, self.asking = 0.0, threading.Lock()
        #: Set when a scenario has failed: the others need not go on.
        self.over = False
        self.root = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.root.rmdir()
        self.environment = {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf")}

    def __enter__(self) -> Session:
        program = Path(__file__).with_name("slurm_cluster.py")
        self.keeper = subprocess.Popen(
            [sys.executable, str(program), str(self.root), str(NODES), PARTITIONS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.keeper.stdout is not None
        if (said := self.keeper.stdout.readline()) != "ready\n":
            raise RuntimeError(f"Slurm did not start: {said}{self.keeper.stdout.read()}")
        os.environ["SLURM_CONF"] = self.environment["SLURM_CONF"]
        return self

    def __exit__(self, *_: object) -> None:
        del os.environ["SLURM_CONF"]
        self.keeper.communicate(timeout=60)  # closes its input

    def call(self, *command: str) -> str:
        """What a program of Slurm prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def command(self, *arguments: str, cwd: Path | None = None) -> str:
        """What `megatron-bert` prints; in this process, which has loaded it already."""
        with self.lock, contextlib.chdir(cwd or self.folder), contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(list(arguments)) == 0, arguments
        return out.getvalue()

    def site(self, name: str, cores: int = 1, max_restarts: int = 3, stop_seconds: int = 75, **variables: str) -> Path:
        """A site file whose jobs have these environment variables and cores per process."""
        (self.folder / f"hold_{name}").mkdir()
        tree = {
            "python": sys.executable,
            "cpus_per_gpu": cores,
            "network_interface": "lo",
            "stop_seconds": stop_seconds,
            "max_restarts": max_restarts,
            "environment": {
                "PYTHONPATH": WITHOUT_PICTURES,
                "OMP_NUM_THREADS": "1",
                "HOLD_FOLDER": str(self.folder / f"hold_{name}"),
                **variables,
            },
        }
        path = self.folder / f"site_{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def submit(self, name: str, site: Path, *arguments: str, run_dir: str | None = None, minutes: int = 20) -> str:
        """Submit a run with settings and options; returns the job's number."""
        settings = [text for text in arguments if re.match(r"\w+\.", text)]
        options = [text for text in arguments if text not in settings]
        said = self.command(
            *("submit", "settings.yaml", f"training.run_dir={run_dir or name}", *settings, *options),
            *("--site", str(site), "--time", str(minutes)),
        )
        (self.folder / f"{name}.said").write_text(said)
        match = re.match(r"job (\d+): ", said)
        assert match is not None, said
        return match.group(1)

    def until(self, done: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < deadline, f"{what} did not happen in time"
            assert not self.over, f"{what} is not waited for, since something else failed"
            time.sleep(0.2)

    def until_held(self, name: str, ranks: int) -> None:
        folder = self.folder / f"hold_{name}"
        self.until(lambda: len(list(folder.glob("rank_*"))) == ranks, f"step {HOLD_STEP} of {name}")

    def job(self, number: str) -> list[dict[str, str]]:
        """What Slurm knew of a job, or of each task of an array, not more than a second ago."""
        with self.asking:
            known = time.monotonic() < self.asked + 1.0 and any(self._is_of(job, number) for job in self.jobs)
            if not known:
                listed = self.call("scontrol", "show", "job").strip().split("\n\n")
                self.jobs = [dict(re.findall(r"(\w+)=(\S*)", record)) for record in listed]
                self.asked = time.monotonic()
            found = [job for job in self.jobs if self._is_of(job, number)]
        assert found, f"Slurm does not know job {number}"
        return found

    @staticmethod
    def _is_of(job: dict[str, str], number: str) -> bool:
        return number in (job.get("JobId"), job.get("ArrayJobId"))

    def until_ended(self, number: str) -> list[dict[str, str]]:
        self.until(
            lambda: all(
                record["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
                for record in self.job(number)
            ),
            f"the end of job {number}",
        )
        return self.job(number)


def time_limit(session: Session) -> Any:
    """Two nodes by torchrun, in the middle of a step when the time is almost up. The second time there is enough."""
    # Told after half a minute, and with time to start and to save on a busy machine.
    site = session.site("time_limit", stop_seconds=270, HOLD_STEP=str(HOLD_STEP))
    options = ["--nodes", "2", "--gpus-per-node", "1", "--partition", "steady"]
    number = session.submit("time_limit", site, "parallel.pipeline=2", *options, minutes=5)
    session.until(lambda: session.job(number)[0]["Restarts"] == "1", "the requeue of the job whose time is up")
    session.call("scontrol", "update", f"jobid={number}", "timelimit=30")
    return session.until_ended(number)


def preemption(session: Session) -> Any:
    """Two nodes by srun, which a run of four nodes by torchrun in a higher partition takes away."""
    layout = ["parallel.pipeline=2", "--gpus-per-node", "1"]
    site = session.site("preempted", cores=10, HOLD_STEP=str(HOLD_STEP))
    low = session.submit("preempted", site, *layout, "--nodes", "2", "--style", "srun", "--partition", "low")
    session.until_held("preempted", 2)
    site = session.site("preempting", cores=10)
    high = session.submit("preempting", site, *layout, "--nodes", "4", "--partition", "high")
    return session.until_ended(high) + session.until_ended(low)


def lost_node(session: Session) -> Any:
    """Two processes on each of two nodes by srun, of which one goes down; then a run that takes what is left."""
    site = session.site("lost_node", HOLD_STEP=str(HOLD_STEP))
    layout = ["parallel.pipeline=2", "--style", "srun", "--partition", "fragile"]
    number = session.submit("lost_node", site, *layout, "--nodes", "2", "--gpus-per-node", "2")
    session.until_held("lost_node", 4)
    lost = session.call("scontrol", "show", "hostnames", session.job(number)[0]["NodeList"]).split()[1]
    session.call("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    elastic = session.submit(
        "elastic", session.site("elastic"), *layout, "--nodes", "4", "--min-nodes", "2", "--gpus-per-node", "1"
    )
    return [{"lost": lost}, *session.until_ended(number), *session.until_ended(elastic)]


def arrays(session: Session) -> Any:
    """A run in two parts, one after the other, of which the first is stopped by the clock; then two runs at once."""
    one = ["--nodes", "1", "--gpus-per-node", "1", "--partition", "high"]
    site = session.site("chain", HOLD_STEP=str(HOLD_STEP))
    chain = session.submit("chain", site, *one, "training.max_minutes=0.2", "--array", "0-2%1")
    sweep = session.submit(
        "sweep", session.site("sweep"), *one, "training.seed=%a", "--array", "7-8", run_dir="sweep/%a"
    )
    return session.until_ended(chain) + session.until_ended(sweep)


def failure(session: Session) -> Any:
    """One rank of two fails; the next try goes on."""
    site = session.site("failure", HOLD_STEP=str(HOLD_STEP), FAIL_RANK="1")
    arguments = [
        "parallel.pipeline=2",
        "--nodes",
        "2",
        "--gpus-per-node",
        "1",
        "--style",
        "srun",
        "--partition",
        "steady",
    ]
    return session.until_ended(session.submit("failure", site, *arguments))


def refusal(session: Session) -> Any:
    """A run by each style whose data are not there, which its ranks find out."""
    site, size = session.site("refused"), ["--nodes", "2", "--gpus-per-node", "1", "--partition", "high"]
    jobs = [
        session.submit(f"refused by {style}", site, "data.train=nowhere", "--style", style, *size)
        for style in ("srun", "torchrun")
    ]
    return [job for number in jobs for job in session.until_ended(number)]


def documented_scripts(session: Session) -> Any:
    """What sbatch says of the scripts in the documentation."""
    said = {}
    for name in DOCUMENTED:
        path = ROOT / "docs" / "scripts" / f"{name}.sbatch"
        done = subprocess.run(
            ["sbatch", "--test-only", str(path)], env=session.environment, capture_output=True, text=True, timeout=60
        )
        said[name] = [done.returncode, done.stderr]
    return said


def without_submit(session: Session) -> Any:
    """The batch script of the checkout, and the doctor as a task on each of two nodes."""
    run = session.folder / "by_hand"
    run.mkdir()
    session.environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = ["--nodes=1", "--nodelist=n13", "--gpus-per-node=1", f"--chdir={ROOT}", f"--output={run}/slurm-%j.out"]
    script = str(ROOT / "launch" / "slurm_pretrain.sbatch")
    said = session.call("sbatch", "--parsable", *options, script, str(session.folder / "settings.yaml"), str(run))
    doctor = ["doctor", "--megabytes", "1", "--dir", str(session.folder / "doctor")]
    step = ["srun", "--nodes=2", "--nodelist=n[14-15]", "--ntasks=2", "--ntasks-per-node=1"]
    report = session.call(*step, sys.executable, "-m", "megatron_bert", *doctor)
    return [*session.until_ended(said.strip()), {"doctor": report}]


def corpus(session: Session) -> Any:
    """A corpus in four parts, one of which is killed on the way and started again, and the job that merges them."""
    folder = session.folder / "corpus"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "."]))
    lines = [json.dumps({"text": f"The cat {number}. The cat! " * 40}) + "\n" for number in range(8000)]
    (folder / "text.jsonl").write_text("".join(lines))
    given = ["--input", "text.jsonl", "--tokenizer", "vocab.txt", "--output-prefix"]
    job = ["--command", "preprocess", "--parts", "4", "--cpus-per-part", "1", "--time", "10"]
    words = [*job, "--site", str(session.site("corpus")), "--", *given, "out/apart", "--workers", "1"]
    said = session.command("submit", *words, cwd=folder)
    match = re.match(r"job (\d+): .*; job (\d+) merges", said)
    assert match is not None, said
    parts, merging = match.groups()
    killed = random.randint(1, 4)
    place = folder / "out"
    session.until(
        lambda: any(path.stat().st_size for path in place.glob(f"*part-0000{killed}*.bin*.tmp")), "a part on its way"
    )
    session.call("scontrol", "requeue", f"{parts}_{killed}")
    ended = session.until_ended(merging) + session.until_ended(parts)
    session.command("preprocess", *given, "out/whole", "--workers", "1", cwd=folder)
    return ended


SCENARIOS = (time_limit, preemption, lost_node, arrays, failure, refusal, corpus, documented_scripts, without_submit)


def undisturbed(settings: Settings, port: int) -> None:
    """A whole run on the ranks of the world this is called in."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # every rank has come
    dist.destroy_process_group()
    variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    pretrain_module.draw_curves = lambda _: None  # as in the jobs; this process ends with the run
    pretrain_module.pretrain(settings)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the world to leave


def undisturbed_runs(settings: Settings) -> None:
    """The same run on one, two and four ranks, without Slurm."""
    for size in (1, 2, 4):
        training = {"run_dir": settings.training.run_dir.with_name(f"whole_{size}")}
        changes = {
            "training": settings.training.model_copy(update=training),
            "parallel": settings.parallel.model_copy(update={"pipeline": min(size, 2)}),
        }
        # It shares the machine with all jobs.
        run_world(size, undisturbed, settings.model_copy(update=changes), free_ports(1)[0], timeout=PATIENCE)


def run_everything(folder: Path) -> dict[str, Any]:
    """All scenarios at once; returns what Slurm said of their jobs, and how long they took."""
    make_data(folder)
    changes = {"training__steps": STEPS, "parallel__data": None, "checkpoint__every": 0, "model__num_hidden_layers": 2}
    settings = run_settings(folder, folder / "run", **changes)
    write_config(settings, folder / "settings.yaml")
    results: dict[str, Any] = {}
    failures: list[BaseException] = []
    began = time.monotonic()

    def timed(name: str, work: Callable[..., Any], *arguments: Any) -> None:
        try:
            results[name] = work(*arguments)
            results[f"{name} seconds"] = round(time.monotonic() - began, 1)
        except BaseException as error:
            if not session.over:
                failures.append(error)
            session.over = True

    with Session(folder) as session, ThreadPoolExecutor(len(SCENARIOS) + 1) as pool:
        for scenario in SCENARIOS:
            pool.submit(timed, scenario.__name__, scenario, session)
        pool.submit(timed, "undisturbed", undisturbed_runs, settings)
    if failures:
        raise failures[0]
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    return results
