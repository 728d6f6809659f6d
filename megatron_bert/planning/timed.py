# SPDX-License-Identifier: Apache-2.0
"""Time that work takes on ranks of one host, of which no more measure at once than it has processors for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

#: Seconds for which something is measured, and how often at least and at most.
LEAST_SECONDS, _LEAST_TIMES, _MOST_TIMES = 0.15, 3, 200
#: Seconds in which ranks find out how many of them can compute at once.
CROWD_SECONDS = 0.5


@dataclass(frozen=True)
class Ranks:
    """The ranks that measure; all call at the same points.

    Attributes:
        device: of this one.
        at_once: how many can compute at the same time: the first ones do, while the others sleep.
    """

    device: torch.device
    at_once: int

    @staticmethod
    def of(device: torch.device) -> Ranks:
        """All that there are, once they have found out how many can compute at once."""
        ranks = dist.get_world_size()
        return Ranks(device, ranks if device.type == "cuda" or ranks == 1 else _processors(ranks))

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of some work that ranks do at the same time, at their mean rate."""
        active = dist.get_rank() < self.at_once
        if active:
            work()
        self.settle()
        dist.barrier()
        rate = torch.tensor(1 / self._own_seconds(work) if active else 0.0, dtype=torch.float64, device=self.device)
        dist.all_reduce(rate)
        return self.at_once / rate.item()

    def _own_seconds(self, work: Callable[[], object]) -> float:
        found: list[float] = []
        began = time.perf_counter()
        while len(found) < _LEAST_TIMES or time.perf_counter() - began < LEAST_SECONDS:
            start = time.perf_counter()
            work()
            self.settle()
            found.append(time.perf_counter() - start)
            if len(found) == _MOST_TIMES:
                break
        return statistics.fmean(found)

    def settle(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _processors(ranks: int) -> int:
    """How many ranks can compute at the same time: how much of a processor each gets when all want one.

    What a process may use of a host (its processors, a quota of a container) shows in what it gets.
    """
    matrix = torch.randn(512, 512)
    matrix @ matrix
    dist.barrier()
    began, worked = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < CROWD_SECONDS:
        matrix @ matrix
    share = (time.process_time() - worked) / (time.perf_counter() - began) / torch.get_num_threads()
    shares = torch.tensor(share, dtype=torch.float64)
    dist.all_reduce(shares)
    return min(ranks, max(1, round(shares.item())))
