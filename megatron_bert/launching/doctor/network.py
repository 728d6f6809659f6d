# SPDX-License-Identifier: Apache-2.0
"""The network between hosts: all-reduce over all ranks, every pair of hosts, and whose clock is off."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from megatron_bert.launching.doctor.findings import Finding, ok, warning
from parallel.errors import first_of

#: A link is slow below this share of the median.
_SLOW = 0.6
#: Seconds for all pairs of hosts; with many hosts not every pair is tried.
_PAIR_BUDGET = 20.0
#: Clocks that differ by more make file times and logs misleading, in seconds.
_CLOCK_LIMIT = 1.0
#: Times a measurement is repeated; the best counts, since anything else only adds time.
_REPEATS = 3
_EXCHANGES = 5


def all_reduce_bandwidth(device: torch.device, megabytes: int) -> float:
    """Bus bandwidth of an all-reduce over all ranks, in GB/s: 2 (n - 1) / n times the bytes, over the time.

    Args:
        device: of the tensor; NCCL on GPUs, gloo on the CPU.
    """
    size = dist.get_world_size()
    tensor = torch.ones(megabytes * 2**20 // 4, device=device)
    dist.all_reduce(tensor)  # connects
    best = float("inf")
    for _ in range(_REPEATS):
        _wait(device)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        _wait(device)
        best = min(best, time.perf_counter() - began)
    slowest = torch.tensor([best], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return 2 * (size - 1) / size * tensor.nbytes / slowest.item() / 1e9


def rounds_of_pairs(count: int) -> list[list[tuple[int, int]]]:
    """Every pair of ``count`` hosts once, in rounds in which no host occurs twice (a round-robin tournament)."""
    places: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    rounds = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append([(a, b) if a < b else (b, a) for a, b in pairs if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def pair_bandwidths(leaders: list[int], device: torch.device, megabytes: int) -> dict[tuple[int, int], float]:
    """GB/s each way between pairs of hosts, both ways at once; on every rank the same. Every rank calls.

    Pairs of a round are measured at the same time. Rounds stop when the time budget is spent.

    Args:
        leaders: a rank of each host.
        megabytes: sent each way.
    """
    rank = dist.get_rank()
    mine = torch.ones(megabytes * 2**20 // 4, device=device)
    other = torch.empty_like(mine)
    found: dict[tuple[int, int], float] = {}
    began = time.monotonic()
    for pairs in rounds_of_pairs(len(leaders)):
        # The slower of both ends: the other's part may still lie in buffers when its own is done.
        seconds = torch.zeros(len(leaders), len(leaders), dtype=torch.float64)
        for a, b in pairs:
            if rank in (leaders[a], leaders[b]):
                partner = leaders[b] if rank == leaders[a] else leaders[a]
                seconds[a, b] = _exchange_seconds(mine, other, partner, device)
        spent = torch.tensor([time.monotonic() - began], dtype=torch.float64)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
        found |= {(a, b): mine.nbytes / seconds[a, b].item() / 1e9 for a, b in pairs}
        if spent.item() > _PAIR_BUDGET:
            break
    return found


def _exchange_seconds(mine: torch.Tensor, other: torch.Tensor, partner: int, device: torch.device) -> float:
    best = float("inf")
    for repeat in range(_REPEATS + 1):
        _wait(device)
        began = time.perf_counter()
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, partner), dist.P2POp(dist.irecv, other, partner)])
        for work in works:
            work.wait()
        _wait(device)
        if repeat:  # the first one connects
            best = min(best, time.perf_counter() - began)
    return best


def judge_links(hosts: list[str], speeds: dict[tuple[int, int], float]) -> list[Finding]:
    """Which links are slow; where all slow ones meet at a host, it is named.

    Args:
        speeds: (index, index) of hosts -> GB/s.
    """
    median = statistics.median(speeds.values())
    slow = {pair: speed for pair, speed in speeds.items() if speed < _SLOW * median}
    measured = (
        f"{len(speeds)} of {len(hosts) * (len(hosts) - 1) // 2} pairs of hosts, median {median:.2f} GB/s each way"
    )
    if not slow:
        (a, b), lowest = min(speeds.items(), key=lambda item: item[1])
        return [ok("links", f"{measured}, slowest {hosts[a]} <-> {hosts[b]} {lowest:.2f} GB/s")]
    common = set.intersection(*({*pair} for pair in slow))
    touched = [pair for pair in speeds if common & {*pair}]
    if len(common) == 1 and len(slow) > 1 and len(slow) == len(touched):
        host = hosts[common.pop()]
        return [
            warning(
                "links",
                f"{host} is slow: {min(slow.values()):.2f} to {max(slow.values()):.2f} GB/s to every other host "
                f"({measured}); leave it out (sbatch --exclude={host}) and have its network card looked at",
            )
        ]
    worst = sorted(slow.items(), key=lambda item: item[1])
    named = first_of((f"{hosts[a]} <-> {hosts[b]} {speed:.2f} GB/s" for (a, b), speed in worst), 5)
    return [warning("links", f"slow: {named} ({measured}); look at cables, switches and the interface in use")]


def clock_offsets(leaders: list[int]) -> list[float]:
    """How far each host's clock is ahead of the first's, in seconds; on every rank the same. Every rank calls."""
    rank = dist.get_rank()
    offsets = torch.zeros(len(leaders), dtype=torch.float64)
    for index, leader in enumerate(leaders[1:], start=1):
        if rank == leaders[0]:
            offsets[index] = _ask_for_time(leader)
        elif rank == leader:
            _tell_time(leaders[0])
    dist.all_reduce(offsets)
    return offsets.tolist()


def _ask_for_time(partner: int) -> float:
    """The partner's clock less this one, at the middle of the quickest of several exchanges."""
    answer = torch.zeros(1, dtype=torch.float64)
    best, offset = float("inf"), 0.0
    for _ in range(_EXCHANGES):
        began = time.time()
        dist.send(torch.zeros(1, dtype=torch.float64), partner)
        dist.recv(answer, partner)
        ended = time.time()
        if ended - began < best:
            best, offset = ended - began, answer.item() - (began + ended) / 2
    return offset


def _tell_time(partner: int) -> None:
    question = torch.zeros(1, dtype=torch.float64)
    for _ in range(_EXCHANGES):
        dist.recv(question, partner)
        dist.send(torch.tensor([time.time()], dtype=torch.float64), partner)


def judge_clocks(hosts: list[str], offsets: list[float]) -> list[Finding]:
    """Whose clock is off, beside the median of all."""
    middle = statistics.median(offsets)
    off = {host: offset - middle for host, offset in zip(hosts, offsets, strict=True)}
    wrong = [f"{host} by {offset:+.1f} s" for host, offset in off.items() if abs(offset) > _CLOCK_LIMIT]
    if wrong:
        return [warning("clocks", f"off: {', '.join(wrong)}; times of files and logs mislead: start NTP there")]
    return [ok("clocks", f"within {max(abs(offset) for offset in off.values()) * 1000:.1f} ms of each other")]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
