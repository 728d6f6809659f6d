# SPDX-License-Identifier: Apache-2.0
"""Where ranks sit, data sizes that fit, and processes without a place."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from parallel.errors import UserError
from parallel.host_order import host_order_warnings
from parallel.mesh import ParallelLayout, fit_data_size
from parallel.process_group import process_group, wait_as_spare
from tests.integration.slurm_cluster import free_ports
from tests.worlds import run_world

BY_HOST = ["a"] * 4 + ["b"] * 4
IN_TURN = ["a", "b"] * 4


class TestPlacement:
    @pytest.mark.parametrize("sizes", [{"tensor": 4, "data": 2}, {"tensor": 2, "pipeline": 2, "data": 2}, {"data": 8}])
    def test_host_by_host(self, sizes: dict[str, int]) -> None:
        assert host_order_warnings(ParallelLayout(**sizes), BY_HOST) == []
        assert host_order_warnings(ParallelLayout(**sizes), ["a"] * 8) == []

    def test_in_turn(self) -> None:
        (text,) = host_order_warnings(ParallelLayout(tensor=2, data=4), IN_TURN)
        assert text.startswith("4 of 4 tensor groups reach over the network, ranks 0 to 1 over hosts a, b: start them")
        (text,) = host_order_warnings(ParallelLayout(pipeline=2, data=4), IN_TURN)
        assert "not in the order of their hosts" in text
        assert host_order_warnings(ParallelLayout(data=8), IN_TURN) == []  # all ranks talk alike

    def test_tensor_groups_larger_than_a_host(self) -> None:
        (text,) = host_order_warnings(ParallelLayout(tensor=8), BY_HOST)
        assert "choose a tensor-parallel size that divides the number of processes on a host" in text


class TestElasticSize:
    @pytest.mark.parametrize(("world", "size"), [(64, 8), (63, 4), (32, 4), (24, 2), (8, 1)])
    def test_largest_that_fits(self, world: int, size: int) -> None:
        assert fit_data_size(world, tensor=4, pipeline=2, choices=[1, 2, 4, 8, 16]) == size

    def test_at_most_what_is_asked_for(self) -> None:
        assert fit_data_size(64, tensor=1, pipeline=1, data=16, choices=[1, 2, 4, 8, 16, 32]) == 16

    def test_too_few(self) -> None:
        with pytest.raises(UserError, match="7 processes are too few for tensor 4 x pipeline 2"):
            fit_data_size(7, tensor=4, pipeline=2, choices=[2, 4])


def with_spares(port: int) -> float | None:
    """A run of the first two of four processes."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    total = None
    if rank >= 2:
        wait_as_spare()
    else:
        with process_group("cpu", size=2) as world:
            ones = torch.ones(1)
            dist.all_reduce(ones)
            assert world.size == 2
            total = ones.item()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the world to leave
    return total


def test_processes_left_over_wait() -> None:
    assert run_world(4, with_spares, free_ports(1)[0]) == [2.0, 2.0, None, None]
