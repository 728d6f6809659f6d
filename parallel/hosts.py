# SPDX-License-Identifier: Apache-2.0
"""The host a process runs on."""

from __future__ import annotations

import os
import socket


def host_name() -> str:
    """The host's name: Slurm's for the node, which operators know it by, where Slurm started the process."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
