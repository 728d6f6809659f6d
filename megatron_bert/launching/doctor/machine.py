# SPDX-License-Identifier: Apache-2.0
"""What a rank knows of its machine, and how the ranks compare: versions, GPUs, memory, limits."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from megatron_bert.launching.doctor.findings import Finding, failed, ok, warning
from parallel.errors import first_of
from parallel.hosts import host_name

#: Files that a process may have open, at least: sockets to every rank, and memory-mapped corpora.
_LEAST_FILES = 4096
#: Shared memory that loader processes hand batches over in, in bytes, at least.
_LEAST_SHARED_MEMORY = 1 << 30
#: Of a GPU's memory, what others may hold before it is worth a word.
_BUSY = 0.05


@dataclass(frozen=True)
class Machine:
    """What a rank sees where it runs; all fields are compared or printed.

    Attributes:
        versions: component -> version.
        gpus: name of each GPU of the host.
        gpu_memory: bytes of its own GPU, free and in all; None without.
        open_files: the limit.
        shared_memory: free bytes of /dev/shm; None where there is none.
    """

    host: str
    versions: dict[str, str]
    gpus: list[str]
    gpu_memory: tuple[int, int] | None
    open_files: int
    shared_memory: int | None


def this_machine(device: torch.device) -> Machine:
    """What this rank, which would compute on the device, sees."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "interpreter": sys.executable}
    try:
        versions["megatron-bert"] = version("megatron-bert")
    except PackageNotFoundError:
        versions["megatron-bert"] = "not installed"
    gpus: list[str] = []
    memory = None
    if device.type == "cuda":
        versions["CUDA"] = str(torch.version.cuda)
        versions["NCCL"] = ".".join(str(part) for part in torch.cuda.nccl.version())
        driver = Path("/sys/module/nvidia/version")
        versions["driver"] = driver.read_text().strip() if driver.exists() else "unknown"
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        memory = torch.cuda.mem_get_info(device)
    shared = Path("/dev/shm")
    return Machine(
        host=host_name(),
        versions=versions,
        gpus=gpus,
        gpu_memory=memory,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shared_memory=shutil.disk_usage(shared).free if shared.is_dir() and os.access(shared, os.W_OK) else None,
    )


def compare(machines: list[Machine]) -> list[Finding]:
    """What is the same on the machines of all ranks, what is not, and what is too little."""
    findings = []
    for name in machines[0].versions:
        groups = _groups(machines, lambda machine, name=name: machine.versions.get(name, "none"))  # type: ignore[misc]
        if len(groups) == 1:
            findings.append(ok("version", f"{name} {next(iter(groups))}"))
        else:
            differ = "; ".join(f"{value} on {first_of(hosts, 6)}" for value, hosts in groups.items())
            grade = warning if name in ("interpreter", "driver") else failed
            findings.append(grade("version", f"{name} differs: {differ}; use one environment on all hosts"))
    findings += _gpus(machines)
    few = {machine.host: machine.open_files for machine in machines if machine.open_files < _LEAST_FILES}
    if few:
        text = f"open files are limited to {min(few.values())} on {first_of(few, 6)}: ulimit -n {_LEAST_FILES} or more"
        findings.append(warning("limits", text))
    small = {m.host: m.shared_memory or 0 for m in machines if (m.shared_memory or 0) < _LEAST_SHARED_MEMORY}
    if small:
        text = f"/dev/shm has {min(small.values()) / 2**20:,.0f} MiB on {first_of(small, 6)}: loader processes may fail"
        findings.append(warning("limits", f"{text}; give containers more (--shm-size), or set data.workers=0"))
    return findings


def _gpus(machines: list[Machine]) -> list[Finding]:
    groups = _groups(machines, lambda machine: ", ".join(sorted(machine.gpus)) or "none")
    findings = []
    if len(groups) > 1:
        differ = "; ".join(f"{value} on {first_of(hosts, 6)}" for value, hosts in groups.items())
        findings.append(failed("GPUs", f"hosts differ: {differ}; a run goes at the pace of the slowest"))
    else:
        gpus = machines[0].gpus
        counted = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
        findings.append(ok("GPUs", f"{counted} on each host" if gpus else "none: runs compute on the CPU"))
    for rank, machine in enumerate(machines):
        free, total = machine.gpu_memory or (1, 1)
        if free < (1 - _BUSY) * total:
            holds = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free: another process holds the rest"
            findings.append(warning("GPUs", f"rank {rank} on {machine.host} has {holds}; see nvidia-smi there"))
    return findings


def _groups(machines: list[Machine], key: Callable[[Machine], str]) -> dict[str, list[str]]:
    """Value -> hosts that have it."""
    groups: dict[str, list[str]] = defaultdict(list)
    for machine in machines:
        if machine.host not in groups[key(machine)]:
            groups[key(machine)].append(machine.host)
    return dict(groups)
