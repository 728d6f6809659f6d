# SPDX-License-Identifier: Apache-2.0
"""A world of any size simulated by one of its ranks: collectives return at once, and tensors have no numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import _utils
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from megatron_bert.planning.shapes import ShapesMode
from parallel.process_group import SIMULATED, World
from parallel.simulated_device import standing_for_gpu


@contextmanager
def simulated_world(rank: int, size: int) -> Iterator[World]:
    """The world as a rank of it sees it, without the others; no other world may be running in the process."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a process is in one world at a time"
    # What torch remembers of operators on sharded tensors names the groups of the world before.
    _clear_sharding_prop_cache()
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
    with ExitStack() as stack:
        # Meshes, and shards of tensors on them, ask tensors of their own for numbers.
        stack.enter_context(patch.object(DeviceMesh, "__init__", _with_numbers(DeviceMesh.__init__)))
        mesh = DeviceMesh.mesh.fget  # type: ignore[attr-defined]
        stack.enter_context(patch.object(DeviceMesh, "mesh", property(_with_numbers(mesh))))
        where = "_compute_local_shape_and_global_offset"
        stack.enter_context(patch.object(_utils, where, _with_numbers(getattr(_utils, where))))
        stack.enter_context(ShapesMode(allow_non_fake_inputs=True))
        stack.enter_context(standing_for_gpu(gpu))
        yield


def _with_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return run
