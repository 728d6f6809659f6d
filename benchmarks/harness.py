# SPDX-License-Identifier: Apache-2.0
"""What benchmarks have in common: how results were made, ratios of pairs, and the file they end in."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatron_bert.json_file import read_object
from megatron_bert.planning.this_machine import processor_name
from parallel.whole_files import write_json


def provenance(
    name: str, *packages: str, arguments: Sequence[str] | None = None, device: torch.device | None = None
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
        "machine": torch.cuda.get_device_name(device) if device and device.type == "cuda" else processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: version(package) for package in packages},
        },
    }


def spread(values: Iterable[float]) -> dict[str, float]:
    """Least, median and most of some values."""
    found = sorted(values)
    return {"min": found[0], "median": statistics.median(found), "max": found[-1]}


def ratios(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """How many times as long as its partner each one takes, least, median and most, of steps that took turns."""
    return spread(mine / other for mine, other in zip(times, base, strict=True))


def earlier_report(path: Path | None) -> dict[str, Any]:
    """What earlier calls have left in a file of results, for new ones to be put beside it; nothing where none is."""
    return {} if path is None or not path.is_file() else read_object(path, "remove it, or give another file")


def publish(report: Mapping[str, Any], output: Path | None) -> None:
    """Print a report, and write it as a JSON file if there is one to write."""
    print(json.dumps(report, indent=2))
    if output is not None:
        write_json(output, report)
