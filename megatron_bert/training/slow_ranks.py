# SPDX-License-Identifier: Apache-2.0
"""Ranks that take longer than those with the same work, for which all the others wait."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, median_low

import torch
import torch.distributed as dist

from parallel.host_order import gather_hosts
from parallel.mesh import ParallelMesh
from parallel.step_clock import StepClock

#: A rank is slow that has taken so many times as long as the median of its peers, in so many readings in a row, and
#: longer by so many seconds per step: less is noise.
SLOW_FACTOR, SLOW_READINGS, SLOW_SECONDS = 1.5, 3, 0.01


class SlowRanks:
    """Compares ranks by their readings; each slow one is named once, until it is as fast as the others.

    Args:
        peers: ranks with the same work, such as those of one pipeline stage.
        hosts: of all ranks.
    """

    def __init__(self, peers: Sequence[Sequence[int]], hosts: Sequence[str]) -> None:
        self.peers, self.hosts = peers, hosts
        self._times_slow = [0] * len(hosts)

    def notes(self, seconds: Sequence[float]) -> list[str]:
        """A sentence for each rank that is found to be slow with these readings, in seconds per step by rank."""
        notes = []
        for ranks in self.peers:
            usual = median_low(seconds[rank] for rank in ranks)
            for rank in ranks:
                slow = seconds[rank] > SLOW_FACTOR * usual and seconds[rank] > usual + SLOW_SECONDS
                self._times_slow[rank] = self._times_slow[rank] + 1 if slow else 0
                if self._times_slow[rank] == SLOW_READINGS:
                    notes.append(
                        f"rank {rank} on {self.hosts[rank]} is slow: {seconds[rank]:.3g} s of work a step, the median "
                        f"of ranks with the same work {usual:.3g} s; all the others wait for it, so look at that host"
                    )
        return notes


class RankTimes:
    """Gathers the readings of all ranks; every rank constructs and calls it at the same points.

    Attributes:
        notes: what is to be said after the last reading.
    """

    def __init__(self, mesh: ParallelMesh, clock: StepClock) -> None:
        self.clock, self.size = clock, mesh.layout.world_size
        self.notes: list[str] = []
        self.hosts = gather_hosts()
        self.slow = SlowRanks(mesh.device_mesh.mesh.flatten(1).tolist(), self.hosts)

    def read(self) -> dict[str, float | str]:
        """Seconds of work a step, of the ranks: the least, the median, the most, and whose that is; {} for one rank."""
        mine = torch.tensor([self.clock.read()], dtype=torch.float64)
        if self.size == 1:
            return {}
        everyone = torch.empty(self.size, dtype=torch.float64)
        dist.all_gather_into_tensor(everyone, mine)
        seconds: list[float] = everyone.tolist()
        self.notes = self.slow.notes(seconds)
        slowest = max(range(self.size), key=seconds.__getitem__)
        return {
            "step_seconds_min": min(seconds),
            "step_seconds_median": median(seconds),
            "step_seconds_max": seconds[slowest],
            "slowest_rank": slowest,
            "slowest_host": self.hosts[slowest],
        }
