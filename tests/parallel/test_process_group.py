# SPDX-License-Identifier: Apache-2.0
"""Joining and leaving a world."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist

from parallel.errors import UserError
from parallel.process_group import (
    LAUNCHER_VARIABLES,
    World,
    choose_device,
    launched_world_size,
    process_group,
)
from tests.commands import run_ranks


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_process_alone_is_a_world_of_one():
    with process_group("cpu") as world:
        assert world == World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
        assert world.is_first
        total = torch.ones(2)
        dist.all_reduce(total)
        assert total.tolist() == [1.0, 1.0]
    assert not dist.is_initialized()


def test_the_group_is_left_after_an_error():
    with pytest.raises(RuntimeError, match="inside"), process_group("cpu"):
        raise RuntimeError("inside")
    assert not dist.is_initialized()


def test_the_rounding_of_matrix_products_is_what_it_was():
    with process_group("cpu"):
        torch.set_float32_matmul_precision("high")
    assert torch.get_float32_matmul_precision() == "highest"


def test_missing_launcher_variables_are_named(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "left LOCAL_RANK, MASTER_ADDR, MASTER_PORT unset: start with torchrun"
    with pytest.raises(UserError, match=message), process_group("cpu"):
        pass
    assert not dist.is_initialized()


def test_launched_world_size(monkeypatch):
    assert launched_world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert launched_world_size() == 8


def test_devices(monkeypatch):
    assert choose_device("cpu", 3) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0) == torch.device("cpu")
    with pytest.raises(UserError, match=re.escape("'cuda' but this machine has no usable CUDA device: set device=cpu")):
        choose_device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="local rank 2 has no GPU: this host has 2; lower --nproc-per-node"):
        choose_device("cuda", 2)


_PROGRAM = """
import torch, torch.distributed as dist
from parallel.process_group import process_group
with process_group("cpu") as world:
    total = torch.tensor([1.0 + world.rank])
    dist.all_reduce(total)
    assert total.item() == 3.0 and world.size == 2 and world.local_rank == world.rank
assert not dist.is_initialized()
"""


def test_processes_of_a_launcher_meet(tmp_path):
    (tmp_path / "program.py").write_text(_PROGRAM)
    ended = run_ranks(2, "program.py", folder=tmp_path, python=True)
    assert [rank.code for rank in ended] == [0, 0], ended
