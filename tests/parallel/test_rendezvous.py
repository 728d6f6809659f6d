# SPDX-License-Identifier: Apache-2.0
"""Ranks of one start meet in a store that remembers other starts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from parallel.rendezvous import private_part

PATIENCE = timedelta(seconds=60)


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def connect(server: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore("localhost", server.port, wait_for_workers=False, timeout=PATIENCE)


def start(server: dist.TCPStore, ranks: list[int], size: int, timeout: timedelta = PATIENCE) -> dict[int, dist.Store]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        waiting = {rank: pool.submit(private_part, connect(server), rank, size, timeout) for rank in ranks}
        return {rank: future.result() for rank, future in waiting.items()}


def test_what_one_start_leaves_no_later_one_sees(server: dist.TCPStore) -> None:
    for number in range(3):
        parts = start(server, [0, 1, 2], size=3)
        assert not parts[1].check(["address"])
        parts[0].set("address", str(number))
        assert [parts[rank].get("address") for rank in (1, 2)] == [str(number).encode()] * 2


def test_ranks_that_died_before_they_had_met_do_not_count(server: dist.TCPStore) -> None:
    short = timedelta(seconds=0.3)
    with pytest.raises(dist.DistStoreError):
        start(server, [1], size=3, timeout=short)
    with pytest.raises(dist.DistStoreError, match="rank 2 did not come"):
        start(server, [0, 1], size=3, timeout=short)
    parts = start(server, [0, 1, 2], size=3)
    parts[2].set("address", "new")
    assert parts[0].get("address") == parts[1].get("address") == b"new"


def test_starts_of_other_sizes(server: dist.TCPStore) -> None:
    for size in (3, 1, 2):
        parts = start(server, list(range(size)), size)
        parts[0].set("size", str(size))
        assert all(part.get("size") == str(size).encode() for part in parts.values())
