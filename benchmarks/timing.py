# SPDX-License-Identifier: Apache-2.0
"""Clocks of the benchmarks, and the name of the machine they ran on."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    """Duration of one step."""
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def processor_seconds(step: Callable[[], Any]) -> float:
    """Processor time of one step, over all threads: what to compare where other programs run too."""
    began = time.process_time()
    step()
    return time.process_time() - began


def processor_name() -> str:
    """Name of the CPU, as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def machine_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
