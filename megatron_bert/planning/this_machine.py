# SPDX-License-Identifier: Apache-2.0
"""The machine at hand: its processor, its memory, and processes of it that meet as ranks do."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def processor_name() -> str:
    """Name of the CPU, as Linux gives it; empty where nobody knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def memory_bytes() -> int:
    """Memory of the host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def threads_of_rank(ranks: int) -> int:
    """Threads of each process of a run: those of OMP_NUM_THREADS; else all that there are, or one for several ranks."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    return torch.get_num_threads() if ranks == 1 else 1  # as torchrun does


def run_ranks(ranks: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run something in so many new processes, each of which finds in its environment what torchrun puts there.

    Args:
        work: called with the rank and what follows.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (ranks, port, work, arguments), nprocs=ranks)


def _rank(rank: int, ranks: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks)
    )
    torch.set_num_threads(threads_of_rank(ranks))
    work(rank, *arguments)
