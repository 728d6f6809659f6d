# SPDX-License-Identifier: Apache-2.0
"""The harness itself: results by rank, errors with their traceback, and no hanging worlds."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from parallel.errors import UserError
from tests.worlds import RankError, Together, make_mesh, make_tensor_parallel, run_world


def _sum_of_ranks(offset: torch.Tensor) -> torch.Tensor:
    total = offset + dist.get_rank()
    dist.all_reduce(total)
    return total


def _one_rank_fails() -> None:
    if dist.get_rank() == 1:
        raise UserError("rank one gives up")
    dist.barrier()


def _one_rank_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


class _UnpicklableError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


def _fails_unpicklably() -> None:
    raise _UnpicklableError("a", "b")


def _one_rank_never_returns() -> None:
    if dist.get_rank() == 0:
        dist.recv(torch.zeros(1), src=1)
    else:
        dist.recv(torch.zeros(1), src=0)


def _groups_and_nothing_else() -> int:
    return make_mesh(tensor=2, pipeline=2).layout.tensor


def _threads() -> int:
    return torch.get_num_threads()


def _handle() -> tuple[int, int, bool]:
    tp = make_tensor_parallel(sequence=True)
    return tp.rank, tp.size, tp.sequence


def test_a_rank_that_is_done_at_once_has_been_met_by_all():
    for _ in range(3):
        assert run_world(4, _groups_and_nothing_else) == [2] * 4


@pytest.mark.parametrize("size", [1, 2, 4])
def test_results_come_by_rank(size):
    offset = torch.tensor([1.0, 2.0])
    expected = offset * size + sum(range(size))
    results = run_world(size, _sum_of_ranks, offset)
    assert len(results) == size
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_an_error_comes_back_with_its_rank_and_traceback():
    with pytest.raises(UserError, match="rank one gives up") as caught:
        run_world(2, _one_rank_fails)
    text = str(caught.value.__cause__)
    assert "rank 1 of 2" in text
    assert "_one_rank_fails" in text


def test_a_dead_rank_ends_the_world():
    with pytest.raises(RankError, match="rank 1 died with exit code 3"):
        run_world(2, _one_rank_dies)


def test_an_error_that_cannot_be_pickled_comes_back_as_text():
    with pytest.raises(RankError, match="_UnpicklableError"):
        run_world(1, _fails_unpicklably)


def test_a_hanging_world_is_killed():
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2"):
        run_world(2, _one_rank_never_returns, timeout=1.0)


def test_ranks_compute_on_one_thread():
    assert run_world(2, _threads) == [1, 1]


def test_handles_over_the_world():
    assert run_world(2, _handle) == [(0, 2, True), (1, 2, True)]
    assert make_tensor_parallel().size == 1


def _repr() -> str:
    return repr(make_mesh(tensor=2))


def test_mesh_in_a_world():
    assert "tensor 1/2" in run_world(2, _repr)[1]


def _process_that_takes(number: int) -> tuple[int, int]:
    if number < 0:
        raise UserError(f"{number} is negative")
    return number, os.getpid()


def test_calls_of_one_size_share_a_world():
    worlds = Together(*((2, _process_that_takes, number) for number in (1, 2, 3)), most=2)
    results = {number: worlds(2, _process_that_takes, number) for number in (1, 2, 3)}
    assert {number: [value for value, _ in by_rank] for number, by_rank in results.items()} == {
        number: [number] * 2 for number in (1, 2, 3)
    }
    assert worlds(2, _process_that_takes, 1) == results[1], "a call runs once"
    processes = {number: [process for _, process in by_rank] for number, by_rank in results.items()}
    assert processes[1] == processes[2]
    assert not set(processes[1]) & set(processes[3])


def test_a_call_that_fails_fails_no_other_of_its_world():
    worlds = Together(*((1, _process_that_takes, number) for number in (1, -2, 3)))
    assert worlds(1, _process_that_takes, 3)[0][0] == 3
    with pytest.raises(UserError, match="-2 is negative"):
        worlds(1, _process_that_takes, -2)
    assert worlds(1, _process_that_takes, 1)[0][0] == 1
