# SPDX-License-Identifier: Apache-2.0
"""What a file of results says of how it was made."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.timing import machine_name


def provenance(
    name: str,
    *packages: str,
    arguments: Sequence[str] | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """How results were made: the command, the machine, threads and versions.

    Args:
        name: of the benchmark's module.
        *packages: whose versions count beside torch's.
        arguments: of the command; those of this process by default.
        device: whose name stands for the machine; the CPU by default.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *given]),
        "machine": machine_name(device or torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: version(package) for package in packages},
        },
    }
