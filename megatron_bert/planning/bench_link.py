# SPDX-License-Identifier: Apache-2.0
"""What messages between ranks of one host take, by their kind."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert.planning.devices import ring_share
from megatron_bert.planning.timed import Ranks
from parallel.flat_buffers import all_gather, reduce_scatter

#: Float32 numbers of messages that are measured: of nothing, as between layers, as of gradients.
NUMBERS = {"cpu": (0, 2**17, 2**20), "cuda": (0, 2**22, 2**26)}
#: Each is sent so often in each of so many rounds, after a product of this size, as of a layer.
MESSAGES, ROUNDS = 8, 6
_SIZE = 512

#: Seconds by which a message makes computation longer, and by which it keeps a processor at work.
_Cost = tuple[float, float]


def measure_link(ranks: Ranks) -> tuple[dict[str, Any] | None, bool]:
    """A `Link`, or None for a single rank, which has none; and whether other programs disturbed its measurement.

    Messages of every kind are sent in groups of as many ranks as divide their number.

    Groups send at the same time, as many as processors let compute at once. Their ranks compute in between, as those of
    a run do, and so wait for the slowest of them.
    """
    world = dist.get_world_size()
    if world == 1:
        return None, False
    found: dict[str, dict[str, Any]] = {}
    disturbed = False
    for many in (n for n in range(2, world + 1) if world % n == 0):
        groups = [dist.new_group(list(range(first, first + many))) for first in range(0, world, many)]
        for kind, costs in _costs(ranks, many, groups[dist.get_rank() // many]).items():
            measured = fit(kind, many, costs)
            disturbed |= not plausible(costs)
            by_ranks = found.get(kind, {}).get("by_ranks", {}) | {many: measured}
            # The largest group's, of all ranks, are those of any that was not measured.
            found[kind] = {**measured, "by_ranks": by_ranks}
    return {**found.pop("all-reduce"), "by_kind": found}, disturbed


def _costs(ranks: Ranks, many: int, group: dist.ProcessGroup) -> dict[str, dict[int, _Cost]]:
    """Costs of a group's messages by kind and bytes; the same on all ranks, also those that only wait."""
    active = dist.get_rank() < max(many, ranks.at_once // many * many)
    works = _works(many, group, ranks.device)
    matrix = torch.randn(_SIZE, _SIZE, device=ranks.device)
    if active:
        for connect in works.values():
            connect()
    rounds = []
    for _ in range(ROUNDS):
        costs = [_each(ranks, active, matrix, work) for work in (None, *works.values())]
        base = costs[0]
        rounds.append([[seconds - without for seconds, without in zip(cost, base, strict=True)] for cost in costs[1:]])
    found: dict[str, dict[int, _Cost]] = {}
    for place, (kind, size) in enumerate(works):
        seconds, worked = (statistics.median(costs[place][part] for costs in rounds) for part in (0, 1))
        found.setdefault(kind, {})[size] = seconds, worked
    return found


def _works(many: int, group: dist.ProcessGroup, device: torch.device) -> dict[tuple[str, int], Callable[[], Any]]:
    """What sends a message, by its kind and bytes."""
    works: dict[tuple[str, int], Callable[[], Any]] = {}
    for numbers in NUMBERS[device.type]:
        own = torch.ones(max(1, -(-numbers // many)), device=device)
        whole = torch.ones(own.numel() * many, device=device)
        size = whole.nbytes if numbers else 0
        works["all-reduce", size] = partial(dist.all_reduce, whole, group=group)
        works["all-gather", size] = partial(all_gather, whole, own, group=group)
        works["reduce-scatter", size] = partial(reduce_scatter, own, whole, group=group)
        if many == 2:
            works["send", size] = partial(_send, whole, group)
    return works


def _send(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """From the first rank of two to the other."""
    first, second = dist.get_process_group_ranks(group)
    if dist.get_rank() == first:
        dist.send(tensor, second, group=group)
    else:
        dist.recv(tensor, first, group=group)


def _each(ranks: Ranks, active: bool, matrix: Tensor, work: Callable[[], Any] | None) -> list[float]:
    """Seconds, of all and of a processor, of as much computation as there is before a message, and of that."""
    dist.barrier()
    start, worked = time.perf_counter(), time.process_time()
    for _ in range(MESSAGES if active else 0):
        matrix @ matrix
        if work is not None:
            work()
    ranks.settle()
    own = time.process_time() - worked
    dist.barrier()
    # As long as all of them take; processors are at work only on those that are active.
    sums = torch.tensor([time.perf_counter() - start, own, 1.0] if active else [0.0] * 3, dtype=torch.float64)
    sums = sums.to(ranks.device)
    dist.all_reduce(sums)
    return (sums[:2] / sums[2] / MESSAGES).tolist()


def plausible(costs: dict[int, _Cost]) -> bool:
    """Whether every message takes some time, and the largest more than the smallest."""
    seconds = [costs[size][0] for size in sorted(costs)]
    return min(seconds) > 0 and seconds[-1] > seconds[0]


def fit(kind: str, many: int, costs: dict[int, _Cost]) -> dict[str, float]:
    """A `Transfer` that fits the costs of messages of several sizes: its rate the largest, its latency the others."""
    sizes = sorted(costs)
    seconds = [max(costs[size][0], 1e-7) for size in sizes]
    moved = [ring_share(kind, many) * size for size in sizes]
    per_byte = max(seconds[-1] - seconds[0], 1e-9) / moved[-1]
    own = [max(0.0, took - size * per_byte) for took, size in zip(seconds[:-1], moved[:-1], strict=True)]
    return {
        "gigabytes_per_second": 1e-9 / per_byte,
        "latency_microseconds": statistics.fmean(own) * 1e6,
        "processor_share": min(1.0, max(0.0, sum(worked for _, worked in costs.values())) / sum(seconds)),
    }
