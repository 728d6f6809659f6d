# SPDX-License-Identifier: Apache-2.0
"""Clocks of the benchmarks, steps to time, and what a command takes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


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


def training_step(parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], rate: float) -> Callable[[], Tensor]:
    """A step of plain PyTorch with fused AdamW at a learning rate; it returns its loss."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, fused=True)

    def step() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


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
