# SPDX-License-Identifier: Apache-2.0
"""Worlds of several gloo processes for tests.

``run_world(4, function, *args)`` calls an importable top-level function on four ranks of a fresh process group and
returns their four results. The processes are forked from a server that imported torch and the packages once, so a call
costs a fraction of a second; the server itself never computes, so the forks are clean.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.mesh import SINGLE, ParallelLayout, ParallelMesh, TensorParallel
from parallel.parts import PLANE, Part
from tests.cheap_imports import COLLECT_AFTER

CPU = torch.device("cpu")

_ROOT = Path(__file__).resolve().parents[1]
#: Seconds by which ranks wait longer for each other than their world may take: it says itself that it took too long.
GRACE = 30.0
_PRELOADED = [
    "tests.cheap_imports",
    "numpy.ma",
    "numpy.typing",
    "pytest",
    "torch",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.profiler._cupti_monitor",
    "torch.utils.checkpoint",
    "parallel.data_parallel",
    "megatron_bert.training.pretrain",
    "tests.worlds",
]


def preload(*modules: str) -> None:
    """Let the server load further modules, which the processes of a test file need: once instead of once per process.

    To be called when the file is imported, before the server starts; later it changes nothing but speed.
    """
    _PRELOADED.extend(name for name in modules if name not in _PRELOADED)


def preload_compiler() -> None:
    """Let the server load what torch loads at the first compilation by aot_eager: that takes longer than to compile."""
    preload(
        "functorch",
        "jinja2",
        "torch._dynamo.backends.distributed",
        "torch._dynamo.debug_utils",
        "torch._functorch.compilers",
        "torch._inductor.debug",
        "torch._inductor.fx_passes.dedupe_symint_uses",
        "torch._inductor.pattern_matcher",
        "torch._inductor.sizevars",
        "torch.distributed.tensor.experimental",
        "torch.export._trace",
    )


class RankError(Exception):
    """The traceback of a failed rank, as text: the cause of the error that ``run_world`` raises."""


def run_world(size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``function(*args)`` on every rank of a world of ``size`` processes.

    Args:
        size: number of processes.
        function: importable from a module's top level.
        *args: for the function; they are pickled, and so is what it returns.
        timeout: seconds after which the world is killed.

    Returns:
        What the function returned, by rank.

    Raises:
        Exception: what the first rank to fail raised, with that rank's traceback as its cause.
        RankError: a rank died silently, or its error cannot be pickled.
        TimeoutError: the world took longer than ``timeout``.
    """
    # Plain bytes: multiprocessing's own pickling of tensors shares memory that lives no longer than its sender.
    payload = pickle.dumps((function, args))
    context = forkserver_context()
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="world-") as folder:
        ends, processes = [], []
        try:
            for rank in range(size):
                here, there = context.Pipe()
                process = context.Process(
                    target=_rank_main,
                    args=(payload, rank, size, f"{folder}/store", timeout + GRACE, there),
                    daemon=True,
                )
                process.start()
                there.close()
                ends.append(here)
                processes.append(process)
            results = _collect(ends, processes, deadline)
            for process in processes:
                process.join()
            return results
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
            for end in ends:
                end.close()


class Together:
    """Worlds that many tests share: to start a rank takes as long as many a test.

    Calls of equally many ranks run in one world, one after the other, when a result of one is first asked for. If one
    of them fails, all run in worlds of their own, so that it fails no test but its own.

    Args:
        *calls: (size, function, *args), as for :func:`run_world`; hashable.
        most: of one world.
    """

    def __init__(self, *calls: tuple[Any, ...], most: int = 12) -> None:
        self.calls, self.most = list(dict.fromkeys(calls)), most
        self._results: dict[tuple[Any, ...], list[Any]] = {}
        self._alone: set[tuple[Any, ...]] = set()

    def __call__(self, *call: Any) -> list[Any]:
        """What ``run_world(*call)`` returns, for one of the calls."""
        if call not in self._results and call not in self._alone:
            group = self._group(call)
            try:
                by_rank = run_world(call[0], _run_calls, [each[1:] for each in group], timeout=240)
                self._results |= zip(group, map(list, zip(*by_rank, strict=True)), strict=True)
            except Exception:
                self._alone |= set(group)
        return self._results[call] if call in self._results else run_world(*call)

    def _group(self, call: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        alike = [each for each in self.calls if each[0] == call[0]]
        start = alike.index(call) // self.most * self.most
        return alike[start : start + self.most]


def _run_calls(calls: list[tuple[Any, ...]]) -> list[Any]:
    return [function(*args) for function, *args in calls]


def _collect(ends: list[Any], processes: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ends):
        waiting = {end: rank for rank, end in enumerate(ends) if rank not in results}
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} of {len(ends)} did not finish in time")
        for end in ready:
            rank = waiting[end]
            try:
                succeeded, value, text = pickle.loads(end.recv_bytes())
            except EOFError:
                processes[rank].join()
                raise RankError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            if succeeded:
                results[rank] = value
                continue
            for other, process in enumerate(processes):
                if process.exitcode:  # its death is what the others complain about
                    raise RankError(f"rank {other} died with exit code {process.exitcode}")
            cause = RankError(f"rank {rank} of {len(ends)}:\n{text}")
            if value is None:
                raise cause
            raise value from cause
    return [results[rank] for rank in range(len(ends))]


def forkserver_context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "GLIBC_TUNABLES")}
    try:
        # The server starts once, here, so that what it preloads is found whatever directory the tests are started from.
        # Its forks copy what they change, and huge pages (tests/conftest.py) are much to copy.
        path = os.pathsep.join(filter(None, (str(_ROOT), before["PYTHONPATH"])))
        _set_variables({"PYTHONPATH": path, "GLIBC_TUNABLES": None})
        forkserver.ensure_running()
    finally:
        _set_variables(before)
    return context


def _set_variables(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def prepare_process() -> None:
    """Settings of a process that the server has forked, to be called first in it."""
    gc.freeze()  # looking for garbage among modules takes time, and copies the pages that are shared with the server
    gc.set_threshold(COLLECT_AFTER)
    gc.enable()
    torch.set_num_threads(1)
    # A receiver that takes the processor from the sender it was woken by leaves it holding a lock, for which gloo's
    # thread in the sender spins until it can go on: half of the time of a small message among more ranks than cores.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _rank_main(payload: bytes, rank: int, size: int, store: str, timeout: float, parent: Any) -> None:
    prepare_process()
    try:
        _join(rank, size, store, timeout)
        function, args = pickle.loads(payload)
        message = pickle.dumps((True, function(*args), ""))
        dist.destroy_process_group()
    except BaseException as error:
        text = traceback.format_exc()
        parent.send_bytes(_failure(error, text))
        # Stay until the parent kills the world: leaving would make the other ranks fail too, and hide who was first.
        parent.poll(timeout)
    else:
        parent.send_bytes(message)


def _join(rank: int, size: int, store: str, timeout: float) -> None:
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
        dist.barrier()  # a rank that is done at once must not leave before the others have connected to it
    except (RuntimeError, dist.DistError) as error:
        raise RankError(
            f"the ranks of this test did not find each other, before any of its code ran ({error}): the machine is too "
            "busy, or the ports of the loopback interface are used up"
        ) from error


def _failure(error: BaseException, text: str) -> bytes:
    try:
        message = pickle.dumps((False, error, text))
        pickle.loads(message)
    except Exception:
        return pickle.dumps((False, None, text))
    return message


def make_mesh(**layout: Any) -> ParallelMesh:
    """A mesh on the CPU over the world this is called in, on all ranks of it; arguments are those of ParallelLayout."""
    mesh = ParallelMesh(ParallelLayout(**layout), CPU)
    if dist.is_initialized():
        dist.barrier()  # as in _join, for the groups of the mesh
    return mesh


def gathered(part: Part, mesh: ParallelMesh) -> torch.Tensor:
    """The whole tensor of which every rank of a (tensor x data) plane holds a part; all of them call."""
    return gathered_all({"": part}, mesh)[""]


def gathered_all(parts: dict[str, Part], mesh: ParallelMesh) -> dict[str, torch.Tensor]:
    """:func:`gathered` of many parts of one type of numbers, in one message."""
    if not parts:
        return {}
    sizes = [math.prod(part.shape) for part in parts.values()]
    buffer = torch.zeros(sum(sizes), dtype=next(iter(parts.values())).dtype)
    wholes = [piece.view(part.shape) for piece, part in zip(buffer.split(sizes), parts.values())]
    for whole, part in zip(wholes, parts.values()):
        assert part.dtype == buffer.dtype
        if all(mesh.coordinate[axis] == 0 for axis in part.axes):  # of the ranks with copies one has a say
            for (offsets, lengths), values in part.blocks():
                whole[tuple(slice(start, start + length) for start, length in zip(offsets, lengths))] = values
    mesh.all_reduce(buffer, tuple(sorted(PLANE)))
    return {name: whole.clone() for name, whole in zip(parts, wholes)}  # a view would be pickled with the whole buffer


def make_tensor_parallel(*, sequence: bool = False) -> TensorParallel:
    """A handle over the whole world; in a world of one, or without any, that of a model that is not divided."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size == 1:
        return SINGLE
    return make_mesh(tensor=size, sequence=sequence).tensor_parallel
