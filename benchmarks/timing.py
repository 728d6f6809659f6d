# SPDX-License-Identifier: Apache-2.0
"""Clocks of the benchmarks, and the name of the machine they ran on."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron_bert.planning.this_machine import processor_name


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


def clock(name: str, device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """The clock of a name: ``wall``, or ``processor``, which leaves waiting out."""
    return processor_seconds if name == "processor" else partial(seconds, device=device)


def machine_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
