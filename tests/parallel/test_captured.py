# SPDX-License-Identifier: Apache-2.0
"""Work that is recorded once and replayed with other values; a tape stands for a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from torch import Tensor

from parallel.captured import Captured, CudaRecorders, on_own_stream
from tests.parallel.tape import Pool, Tape, WaitedError

WEIGHT = torch.linspace(-1.0, 1.0, 12).view(3, 4)


def function_of(gradient: Tensor) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A function that adds to a gradient and returns a loss."""
    weight = WEIGHT.clone().requires_grad_()
    weight.grad = gradient

    def function(given: Mapping[str, Tensor]) -> Tensor:
        loss = (given["x"] @ weight.t()).relu().square().sum() * given["scale"]
        loss.backward()
        return loss.detach()

    return function


def inputs(seed: int, rows: int = 5) -> dict[str, Tensor]:
    return {
        "x": torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)),
        "scale": torch.tensor(1.0 + seed),
    }


@pytest.mark.parametrize("before", [0, 1, 3])
def test_replays_give_what_calls_give(before: int) -> None:
    own, other, tape = torch.zeros(3, 4), torch.zeros(3, 4), Tape()
    function, plain = function_of(own), function_of(other)
    for seed in range(before):
        assert torch.equal(function(inputs(seed)), plain(inputs(seed)))
    captured = Captured(function, tape, inputs(9))
    for seed in range(before, 6):
        result = captured(inputs(seed))
        assert result is not None
        assert torch.equal(result, plain(inputs(seed))), seed
        assert torch.equal(own, other), "gradients add up, once for each call"
    assert tape.replays == 6 - before


def test_what_is_recorded_is_not_done() -> None:
    gradient = torch.zeros(3, 4)
    captured = Captured(function_of(gradient), Tape(), inputs(1))
    assert not gradient.any()
    captured(inputs(1))
    assert gradient.any()


def test_other_work_begins_at_marks() -> None:
    first, second, tape, seen = torch.zeros(2), torch.zeros(2), Tape(), []

    def function(given: Mapping[str, Tensor]) -> None:
        first.copy_(given["x"])
        tape.mark()
        second.copy_(first * 2)
        tape.mark()

    captured = Captured(function, tape, {"x": torch.zeros(2)})
    assert captured({"x": torch.ones(2)}) is None
    captured({"x": torch.full((2,), 3.0)}, lambda: seen.append((first.tolist(), second.tolist())))
    assert seen == [([3.0, 3.0], [2.0, 2.0]), ([3.0, 3.0], [6.0, 6.0])]


def test_other_work_is_waited_for_at_holds() -> None:
    first, second, other, tape = torch.zeros(2), torch.zeros(2), torch.zeros(2), Tape()

    def function(given: Mapping[str, Tensor]) -> Tensor:
        first.copy_(given["x"])
        tape.hold()
        second.copy_(first + other)
        tape.hold()
        return second + other

    captured = Captured(function, tape, {"x": torch.zeros(2)})
    found, seen = captured({"x": torch.ones(2)}), []
    assert found is not None
    assert found.tolist() == [1.0, 1.0]

    def ahead() -> None:
        seen.append((first.tolist(), second.tolist()))
        other.fill_(10.0 * len(seen))

    captured({"x": torch.full((2,), 3.0)}, ahead=ahead)
    assert seen == [([3.0, 3.0], [1.0, 1.0]), ([3.0, 3.0], [13.0, 13.0])]
    assert found.tolist() == [33.0, 33.0]


def test_a_pool_holds_what_was_recorded_first() -> None:
    pool = Pool()
    first = Captured(lambda given: given["x"] + 1, Tape(pool), {"x": torch.zeros(2)})
    kept = first({"x": torch.ones(2)})
    assert kept is not None
    second = Captured(lambda given: given["x"] + kept, Tape(pool), {"x": torch.zeros(2)})
    found = second({"x": torch.ones(2)})
    assert found is not None
    assert found.tolist() == [3.0, 3.0]
    first({"x": torch.ones(2)})
    assert found.isnan().all()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"x": torch.zeros(6, 4)}, r"x was \(\(5, 4\), 'float32', 'cpu'\) when it was recorded, and is \(\(6, 4\)"),
        ({"x": torch.zeros(5, 4, dtype=torch.float64)}, "float64"),
        ({"other": torch.zeros(1)}, "recorded with x, scale, but called with x, scale, other"),
    ],
    ids=["shape", "format", "names"],
)
def test_other_inputs_are_refused_and_change_nothing(changed: dict[str, Tensor], says: str) -> None:
    gradient = torch.zeros(3, 4)
    captured = Captured(function_of(gradient), Tape(), inputs(0))
    captured(inputs(0))
    before = gradient.clone()
    with pytest.raises(ValueError, match=says):
        captured({**inputs(1), **changed})
    assert torch.equal(gradient, before)
    captured(inputs(1))


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0]])
def test_waiting_for_the_device_cannot_be_recorded(wait: object) -> None:
    with pytest.raises(WaitedError):
        Tape().record(lambda: wait(torch.ones(3)))  # type: ignore[operator]


@pytest.fixture
def device() -> Iterator[torch.device]:
    """A GPU, whose current stream is not the default one."""
    before, found = torch.cuda.current_stream(), torch.device("cuda", 0)
    on_own_stream(found)
    yield found
    torch.cuda.set_stream(before)


@pytest.mark.gpu
def test_a_cuda_graph_gives_what_calls_give(device: torch.device) -> None:
    weight = WEIGHT.to(device).requires_grad_()
    weight.grad = torch.zeros_like(weight)

    def function(given: Mapping[str, Tensor]) -> Tensor:
        loss = torch.nn.functional.dropout(given["x"] @ weight.t(), 0.5).square().sum()
        loss.backward()
        return loss.detach()

    recorders, found = CudaRecorders(device), []
    for plain_calls in (6, 2):
        weight.grad.zero_()
        torch.cuda.manual_seed(3)
        given = [{"x": inputs(seed)["x"].to(device)} for seed in range(6)]
        losses = [function(one) for one in given[:plain_calls]]
        captured = Captured(function, recorders.recorder(recorders.pool()), given[0])
        for one in given[plain_calls:]:
            result = captured(one)
            assert result is not None
            losses.append(result.clone())
        found.append((torch.stack(losses), weight.grad.clone()))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.gpu
def test_work_behind_a_mark_of_a_cuda_graph_sees_what_came_before(device: torch.device) -> None:
    recorders = CudaRecorders(device)
    recorder = recorders.recorder(recorders.pool())
    large, first = torch.ones(2048, 2048, device=device), torch.zeros(2048, 2048, device=device)

    def function(given: Mapping[str, Tensor]) -> Tensor:
        for _ in range(10):
            first.copy_(large @ large * given["x"])
        recorder.mark()
        out = first * 2
        for _ in range(10):
            out = large @ large + out
        return out

    given = {"x": torch.ones((), device=device)}
    function(given)
    captured, seen = Captured(function, recorder, given), []
    for value in (2.0, 3.0):
        captured({"x": torch.full((), value, device=device)}, lambda: seen.append(first[0, 0].clone()))
    torch.cuda.synchronize()
    assert [one.item() for one in seen] == [2048.0 * 2, 2048.0 * 3]


@pytest.mark.gpu
def test_work_behind_a_hold_of_cuda_graphs_waits_and_goes_on_with_what_was_there(device: torch.device) -> None:
    recorders, aside = CudaRecorders(device), torch.cuda.Stream(device)
    weight = torch.ones(2048, 2048, device=device, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    other = torch.zeros(2048, 2048, device=device)
    recorder = None

    def function(given: Mapping[str, Tensor]) -> Tensor:
        dropped = torch.nn.functional.dropout(weight * given["x"], 0.5)
        if recorder is not None:
            recorder.hold()
        loss = (torch.nn.functional.dropout(dropped, 0.5) + other).sum()
        loss.backward()
        return loss.detach()

    def ahead() -> None:
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(20):
                other.copy_(large @ large)  # 2048 in the end, and not before long
        torch.cuda.current_stream().wait_stream(aside)

    large, found = torch.ones(2048, 2048, device=device), []
    for replayed in (False, True):
        weight.grad.zero_()
        torch.cuda.manual_seed(3)
        given = [{"x": torch.full((), 1.0 + step, device=device)} for step in range(3)]
        other.zero_()
        losses = [function(given[0])]
        recorder = recorders.recorder(recorders.pool()) if replayed else None
        captured = None if recorder is None else Captured(function, recorder, given[0])
        for one in given[1:]:
            other.zero_()
            if captured is None:
                ahead()
            loss = function(one) if captured is None else captured(one, ahead=ahead)
            assert loss is not None
            losses.append(loss.clone())
        found.append((torch.stack(losses), weight.grad.clone()))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
