"""A world of any size simulated by one of its ranks: collectives return at once, and tensors have no numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from parallel.process_group import SIMULATED, World
from parallel.simulated_device import standing_for_gpu


@contextmanager
def simulated_world(rank: int, size: int) -> Iterator[World]:
    """The world as a rank of it sees it, without the others; no other world may be running in the process."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a process is in one world at a time"
    dist.init_process_group(SIMULATED, store=FakeStore(), rank=rank, world_size=size)
    try:
        yield World(rank=rank, size=size, local_rank=0, device=torch.device("cpu"))
    finally:
        dist.destroy_process_group()


@contextmanager
def tensors_without_numbers(gpu: bool) -> Iterator[None]:
    """Tensors have shapes and types but no memory while the block lasts, as those of a GPU if asked.

    They are on the CPU by name: without CUDA, torch cannot differentiate those of a GPU.
    """
    init, mesh = DeviceMesh.__init__, DeviceMesh.mesh
    # Meshes ask their own tensors for numbers.
    DeviceMesh.__init__ = _with_numbers(init)  # type: ignore[method-assign]
    DeviceMesh.mesh = property(_with_numbers(mesh.fget))  # type: ignore[method-assign, attr-defined, assignment]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), standing_for_gpu(gpu):
            yield
    finally:
        DeviceMesh.__init__ = init  # type: ignore[method-assign]
        DeviceMesh.mesh = mesh  # type: ignore[method-assign]


def _with_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return run
