# SPDX-License-Identifier: Apache-2.0
"""Where the ranks of one start meet, whatever an earlier start has left in the launcher's store."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_POLL_SECONDS = 0.005


def launchers_store(timeout: timedelta = timedelta(seconds=300)) -> dist.TCPStore:
    """The store whose address the launcher gives to all of its processes."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False, timeout=timeout
    )


def launcher_keeps_store() -> bool:
    """Whether the store belongs to torchrun itself, and so outlives the processes that it starts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def private_part(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The part of a shared store that only the ranks of this very start know; every rank of it calls.

    torchrun starts its processes again with the store that it gave to the ones before (unless it runs with
    ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``). A process group set up there finds the addresses of processes that are
    gone, and fails or hangs. The launcher's count of restarts does not tell starts apart either: on several hosts each
    agent counts its own.

    Rank 0 names the part by a number drawn at random, and gives the name to a rank in answer to a number drawn by that
    rank, until every rank has said that it knows it. What earlier starts have left answers none of these numbers.

    Args:
        store: shared with ranks of earlier starts.

    Raises:
        dist.DistStoreError: not all ranks came in time.
    """
    number = uuid.uuid4().hex
    if rank == 0:
        _give_name(store, number, set(range(1, size)), timeout)
        return dist.PrefixStore(f"start/{number}", store)
    store.set(f"asks/{rank}", number)
    store.wait([f"answer/{number}"], timeout)
    name = store.get(f"answer/{number}").decode()
    store.set(f"known/{name}/{rank}", "")
    return dist.PrefixStore(f"start/{name}", store)


def _give_name(store: dist.Store, name: str, missing: set[int], timeout: timedelta) -> None:
    deadline = time.monotonic() + timeout.total_seconds()
    answered: set[bytes] = set()
    while missing:
        for rank in sorted(missing):
            if store.check([f"known/{name}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"asks/{rank}"]) and (number := store.get(f"asks/{rank}")) not in answered:
                store.set(f"answer/{number.decode()}", name)
                answered.add(number)
        if missing and time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(missing)))
            raise dist.DistStoreError(f"timed out after {timeout.total_seconds():g} s: rank {ranks} did not come")
        time.sleep(_POLL_SECONDS)
