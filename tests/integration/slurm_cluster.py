# SPDX-License-Identifier: Apache-2.0
"""A Slurm cluster of its own on this machine, until its input ends: `python slurm_cluster.py FOLDER NODES PARTITIONS`.

As root, without systemd, and without touching /etc: its own munge key and socket, free ports, all else in FOLDER.
All nodes are this machine, so they share its name space of processes and ports. The program says "ready" when every
node is idle. When its input ends, in whatever way who started it has ended, it cancels all jobs, stops the daemons and
kills what the jobs have left. It needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

#: Debian and Ubuntu packages: slurmctld slurmd slurm-client munge.
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
CORES, GPUS = 16, 8

CONF = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
# The requeue delay is that of credentials.
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/state/slurmd.%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=1
SlurmctldTimeout=30
SlurmdTimeout=30
KillWait=20
MinJobAge=600
InactiveLimit=0
JobRequeue=1
SwitchType=switch/none
GresTypes=gpu
{nodes}
{partitions}
"""


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now, and that systems do not give to connections: nobody takes them by chance."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(12_000, 32_000), 2_000):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError(f"only {len(ports)} of {count} ports are free")


class Cluster:
    """The daemons of a cluster.

    Args:
        root: folder for everything; must not exist.
        nodes: how many, n1 and up.
        partitions: their lines of slurm.conf.
    """

    def __init__(self, root: Path, nodes: int, partitions: str) -> None:
        self.root, self.nodes, self.partitions = root, nodes, partitions
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}

    def start(self) -> None:
        """Write the configuration, start the daemons, and wait until all nodes are idle."""
        for name in ("log", "state", "run", "munge", "dev", "empty"):
            (self.root / name).mkdir(parents=True)
        self.root.chmod(0o755)
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        # Files that stand for GPUs make them countable.
        for gpu in range(GPUS):
            (self.root / "dev" / f"nvidia{gpu}").touch()
        host = socket.gethostname().split(".")[0]
        port, *ports = free_ports(1 + self.nodes)
        names = [f"n{number}" for number in range(1, self.nodes + 1)]
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={own} CPUs={CORES} RealMemory=4000 "
            f"Gres=gpu:{GPUS} State=UNKNOWN"
            for name, own in zip(names, ports, strict=True)
        ]
        conf = CONF.format(host=host, port=port, root=self.root, nodes="\n".join(lines), partitions=self.partitions)
        (self.root / "slurm.conf").write_text(conf)
        devices = f"{self.root}/dev/nvidia[0-{GPUS - 1}]"
        (self.root / "gres.conf").write_text("".join(f"NodeName={name} Name=gpu File={devices}\n" for name in names))
        munge = self.root / "munge"
        self._daemon(
            [
                *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}/socket"),
                *(f"--pid-file={munge}/pid", f"--log-file={self.root}/log/munged.log", f"--seed-file={munge}/seed"),
            ]
        )
        self._until(lambda: (munge / "socket").exists(), "munged")
        self._daemon(["slurmctld", "-D", "-c"])
        for name in names:
            self._daemon(["slurmd", "-D", "-N", name])
        self._until(lambda: self._idle() == self.nodes, "the nodes")

    def _daemon(self, command: list[str]) -> None:
        with (self.root / "log" / f"{command[0]}.out").open("ab") as out:
            self.daemons.append(
                subprocess.Popen(
                    command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=self.root
                )
            )

    def _idle(self) -> int:
        listed = subprocess.run(
            ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return len(set(listed.stdout.split()))

    def _until(self, done, what: str) -> None:
        deadline = time.monotonic() + 90
        while not done():
            assert time.monotonic() < deadline, f"{what} did not start: see {self.root}/log"
            assert all(daemon.poll() is None for daemon in self.daemons), f"a daemon ended: see {self.root}/log"
            time.sleep(0.05)

    def stop(self) -> None:
        """End jobs, daemons, and processes that jobs have left."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True, timeout=30)
        time.sleep(0.5)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        deadline = time.monotonic() + 5
        for daemon in self.daemons:
            try:
                daemon.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                daemon.kill()
        mark = f"SLURM_CONF={self.root}/slurm.conf".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if int(folder.name) != os.getpid() and mark in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)
            except (OSError, ValueError):
                continue  # gone meanwhile
        shutil.rmtree(self.root, ignore_errors=True)


def main() -> None:
    cluster = Cluster(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a test run that is interrupted closes the pipe
    try:
        cluster.start()
        print("ready", flush=True)
        sys.stdin.read()
    finally:
        cluster.stop()


if __name__ == "__main__":
    main()
