# SPDX-License-Identifier: Apache-2.0
"""Start and stop of torch.distributed, and the device a process works on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.errors import ArgumentError, UserError
from parallel.presence import Presence
from parallel.rendezvous import launcher_keeps_store, launchers_store, private_part
from parallel.step_clock import counting_waits

#: Environment variables torchrun sets for every process.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

#: Backend of a world that is simulated by one of its ranks: collectives return at once.
SIMULATED = "fake"
#: Keys of the launcher's store by which spare processes learn that the run is over, and count who did.
_OVER, _SEEN = "run/over", "run/spares_told"
_RELEASE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run as one of them sees it.

    Attributes:
        rank: number of this process, 0 to size - 1.
        size: number of processes.
        local_rank: number of this process on its host.
        device: where this process computes.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which talks to the user and writes the run's files."""
        return self.rank == 0


def launched_world_size() -> int:
    """Number of processes the launcher started; 1 without a launcher."""
    return _launcher_number("WORLD_SIZE", 1)


def launched_rank() -> int:
    """Number of this process among those the launcher started; 0 without a launcher."""
    return _launcher_number("RANK", 0)


def _launcher_number(name: str, absent: int) -> int:
    text = os.environ.get(name, str(absent))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} is {text!r}, not a number: unset it, or start with torchrun")
    return int(text)


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device for a ``cpu``, ``cuda`` or ``auto`` setting.

    Raises:
        UserError: CUDA is asked for and absent, or the host has fewer GPUs than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ArgumentError("$device is 'cuda' but this machine has no usable CUDA device: set $device=cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: this host has {torch.cuda.device_count()}; "
            "lower --nproc-per-node to that number"
        )
    return torch.device("cuda", local_rank)


def new_group(
    ranks: Sequence[int] | None = None, backend: str | None = None, timeout_seconds: float | None = None
) -> dist.ProcessGroup:
    """A group that waits as long as the run's own; torch would give it half an hour. Every rank of the run must call.

    Args:
        ranks: global ranks of the group; None for all.
        backend: of the group; None for the run's.
        timeout_seconds: how long it waits, if not as long as the run's own.
    """
    world = dist.group.WORLD
    assert world is not None, "groups are made of a running world"
    if is_simulated():
        backend = None  # all groups of a simulated world are
    options = getattr(world._get_backend(torch.device("cpu")), "options", None)  # gloo's; not in every torch
    timeout = None if options is None else options._timeout
    if timeout_seconds is not None:
        timeout = timedelta(seconds=timeout_seconds)
    return dist.new_group(None if ranks is None else list(ranks), timeout=timeout, backend=backend)


def is_simulated() -> bool:
    """Whether the world of this process is one of its ranks, without the others."""
    return dist.is_initialized() and dist.get_backend() == SIMULATED


def own_group(lines: Iterable[Sequence[int]]) -> dist.ProcessGroup | None:
    """Make a group of each of several lines of ranks; this rank's own, if it is in one. Every rank of the run calls."""
    mine: dist.ProcessGroup | None = None
    for line in lines:
        group = new_group(line)
        if dist.get_rank() in line:
            mine = group
    return mine


def wait_as_spare() -> None:
    """Wait until the run is over: what a launched process does that has no place in it.

    It stays with the launcher, which can start it again as a rank when another process is lost.

    Raises:
        RuntimeError: the run ended silently.
    """
    store = launchers_store()
    store.wait([_OVER], timedelta(days=365))
    store.add(_SEEN, 1)


def _release_spares(count: int) -> None:
    """Tell the spares that the run is over, and stay until they know: this process may keep the store."""
    store = launchers_store()
    store.set(_OVER, "")
    deadline = time.monotonic() + _RELEASE_SECONDS
    while store.add(_SEEN, 0) < count and time.monotonic() < deadline:
        time.sleep(0.05)


@contextmanager
def process_group(device: str = "auto", timeout_seconds: float = 600.0, size: int | None = None) -> Iterator[World]:
    """Join the processes of a run, and leave them when the block ends.

    Under a launcher (torchrun) all its processes meet. Without one the world is this process alone,
    with the same collectives available, so that nothing downstream needs a second code path. How float32 matrix
    products round is afterwards as it was before, whatever the run chose.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``.
        timeout_seconds: how long a collective may wait for the other ranks before it fails.
        size: how many of the launched processes take part, the first ones; None for all. The others must not come here
            but call :func:`wait_as_spare`.

    Raises:
        UserError: a launcher variable is missing, or the device cannot be had.
        LostRankError: in place of an error that says only that other ranks are missing; it names them.
    """
    local_rank = _launcher_number("LOCAL_RANK", 0)
    chosen = choose_device(device, local_rank)
    # Checkpoint planning and signal agreement run over CPU tensors, so gloo is there beside NCCL.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    rounding = torch.get_float32_matmul_precision()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "WORLD_SIZE" in os.environ or "RANK" in os.environ:
        missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
        if missing:
            raise UserError(
                f"the launcher left {', '.join(missing)} unset: start with torchrun, or unset RANK/WORLD_SIZE"
            )
        size = launched_world_size() if size is None else size
        spares = launched_world_size() - size
        rank = launched_rank()
        store = private_part(launchers_store(timeout), rank, size, timeout) if launcher_keeps_store() else None
        dist.init_process_group(backend, store=store, timeout=timeout, rank=rank, world_size=size)
    else:
        spares = 0
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    rank, size = dist.get_rank(), dist.get_world_size()
    known = dist.distributed_c10d._get_default_store()
    try:
        with Presence(known, rank, size, timeout_seconds) if size > 1 else nullcontext(), counting_waits():
            yield World(rank=rank, size=size, local_rank=local_rank, device=chosen)
        if spares and dist.get_rank() == 0:
            _release_spares(spares)  # while the store is there, which may be this process's
    finally:
        torch.set_float32_matmul_precision(rounding)
        dist.destroy_process_group()
