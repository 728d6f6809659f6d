# SPDX-License-Identifier: Apache-2.0
"""Clocks of the benchmarks, what a command takes, and the name of the machine they ran on."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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


class Taken(NamedTuple):
    """What a command took.

    Attributes:
        seconds: from its start to its end.
        processor_seconds: of all its threads.
        peak_bytes: of its memory.
    """

    seconds: float
    processor_seconds: float
    peak_bytes: int


def taken_by(*arguments: str) -> Taken:
    """What ``megatron-bert`` takes with arguments, in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, "-m", "megatron_bert", *arguments]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{shlex.join(command)} failed:\n{text}")
    return Taken(time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def machine_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
