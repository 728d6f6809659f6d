# SPDX-License-Identifier: Apache-2.0
"""The host a process runs on, and which processes run there."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def host_name() -> str:
    """The host's name: Slurm's for the node, which operators know it by, where Slurm started the process."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _stat_of(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; the name before it may hold spaces and parentheses."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


def process_start(pid: int) -> int | None:
    """When a process of this host started, in clock ticks since the boot; None where the system does not say."""
    try:
        return int(_stat_of(pid)[19])
    except (OSError, ValueError, IndexError):
        return None


def process_runs(pid: int, started: int | None = None) -> bool:
    """Whether a process of this host, the one that started then, still runs; a zombie does not.

    Where the system does not say, it does.
    """
    try:
        fields = _stat_of(pid)
    except (FileNotFoundError, ProcessLookupError):
        return not os.path.isdir("/proc/self")
    except OSError:
        return True
    return fields[0] not in "ZX" and started in (None, int(fields[19]))
