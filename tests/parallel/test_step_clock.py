# SPDX-License-Identifier: Apache-2.0
"""The time of a rank's own work, without that in which it waits for others."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from parallel import step_clock
from parallel.collectives import start_all_reduce, wait
from parallel.step_clock import StepClock, counting_waits
from tests.worlds import CPU, run_world


def test_seconds_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0])
    monkeypatch.setattr(step_clock, "perf_counter", lambda: next(moments))
    clock = StepClock(CPU)
    for _ in range(2):
        clock.begin_step()
        with clock.on_host():
            pass
    with clock.on_device():
        pass
    assert clock.read() == 3.5
    assert clock.read() == 0.0


def _late(how: str) -> float:
    """Rank 0 comes late to a collective: what each rank takes for its own work."""
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    clock, one = StepClock(CPU), torch.ones(4)
    if rank == 0:
        store.wait(["there"])
        time.sleep(0.5)
    store.set("there", "")
    with counting_waits(), clock.on_host():
        if how == "torch":
            dist.all_reduce(one)
        elif how == "work":
            work = dist.all_reduce(one, async_op=True)
            assert work is not None
            work.wait()
        else:
            group = dist.group.WORLD
            assert group is not None
            one = wait(start_all_reduce(one, group.group_name))
    assert one.tolist() == [2.0] * 4
    return step_clock._waited


@pytest.mark.parametrize("how", ["torch", "work", "functional"])
def test_waiting_is_not_work(how: str) -> None:
    before, wait = dist.Work.wait, run_world(2, _late, how)
    assert wait[1] > wait[0] > 0
    assert dist.Work.wait is before
