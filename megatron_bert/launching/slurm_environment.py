# SPDX-License-Identifier: Apache-2.0
"""A process that srun started, one per GPU, made known to torch.distributed by the variables torchrun would set."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import MutableMapping

from parallel.errors import UserError

#: Ports for the ranks to meet: below those that the kernel gives to outgoing connections (32768 and up).
_FIRST_PORT, _PORTS, _STARTS = 20000, 12000, 16


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a task of several in a Slurm step.

    What is set already stays, so that the batch script may name the meeting point. Nothing is done outside a step, for
    a step of one task, or under torchrun.

    Raises:
        UserError: the first node of the step has no address.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_PROCID" not in environment or tasks == "1":
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = tasks
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = node_address(first_node(environment["SLURM_STEP_NODELIST"]))
    if "MASTER_PORT" not in environment:
        restarts = int(environment.get("SLURM_RESTART_COUNT", "0"))
        environment["MASTER_PORT"] = str(meeting_port(int(environment["SLURM_JOB_ID"]), restarts))


def meeting_port(job: int, restarts: int) -> int:
    """The port at which a job's ranks meet: another one for each job on a node and each start of a job."""
    return _FIRST_PORT + (job * _STARTS + restarts) % _PORTS


def first_node(nodelist: str) -> str:
    """The first name of a Slurm node list such as ``gpu[003-007,012],cpu1``."""
    match = re.match(r"([^\[,]*)(?:\[([^\]]*)\])?([^,]*)", nodelist)
    assert match is not None, "the pattern matches any text"
    prefix, numbers, suffix = match.groups()
    return prefix + re.split("[-,]", numbers or "")[0] + suffix


def node_address(node: str) -> str:
    """The address of a node: its name where that can be looked up, else what Slurm knows.

    Raises:
        UserError: neither is the case.
    """
    try:
        return socket.gethostbyname(node)
    except OSError:
        pass
    try:
        done = subprocess.run(["scontrol", "show", "node", node], capture_output=True, text=True, timeout=30)
        match = re.search(r"NodeAddr=(\S+)", done.stdout)
    except (OSError, subprocess.TimeoutExpired):
        match = None
    if match is None:
        raise UserError(f"node {node} of this Slurm step has no address: set MASTER_ADDR to one that all nodes reach")
    return match.group(1)
