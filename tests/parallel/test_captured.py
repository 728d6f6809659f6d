# SPDX-License-Identifier: Apache-2.0
"""Work that is recorded once and replayed with other values; a tape stands for a CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from parallel.captured import Captured, CudaRecorder, on_own_stream
from tests.parallel.tape import Tape, WaitedError

WEIGHT = torch.linspace(-1.0, 1.0, 12).view(3, 4)


def make(gradient: Tensor, warmups: int = 1) -> tuple[Captured, list[Tape]]:
    """A function that adds to a gradient and returns a loss, and the tapes that it made."""
    tapes: list[Tape] = []
    weight = WEIGHT.clone().requires_grad_()
    weight.grad = gradient

    def function(given: Mapping[str, Tensor]) -> Tensor:
        loss = (given["x"] @ weight.t()).relu().square().sum() * given["scale"]
        loss.backward()
        return loss.detach()

    def record() -> Tape:
        tapes.append(Tape())
        return tapes[-1]

    return Captured(function, record, warmups), tapes


def inputs(seed: int, rows: int = 5) -> dict[str, Tensor]:
    return {
        "x": torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)),
        "scale": torch.tensor(1.0 + seed),
    }


@pytest.mark.parametrize("warmups", [0, 1, 3])
def test_replays_give_what_calls_give(warmups: int) -> None:
    own, other = torch.zeros(3, 4), torch.zeros(3, 4)
    captured, tapes = make(own, warmups)
    plain, _ = make(other, warmups=100)
    for seed in range(6):
        assert torch.equal(captured(inputs(seed)), plain(inputs(seed))), seed
        assert torch.equal(own, other), "gradients add up, once for each call"
    assert [tape.replays for tape in tapes] == [6 - warmups]


def test_what_is_recorded_is_not_done() -> None:
    gradient = torch.zeros(3, 4)
    captured, _ = make(gradient)
    tape = Tape()
    given = inputs(1)
    tape.record(lambda: captured.function(given))
    assert not gradient.any()
    tape.replay()
    assert gradient.any()


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
    captured, _ = make(gradient, warmups=0)
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


@pytest.mark.gpu
def test_a_cuda_graph_gives_what_calls_give() -> None:
    device = torch.device("cuda", 0)
    before = torch.cuda.current_stream()
    on_own_stream(device)
    try:
        weight = WEIGHT.to(device).requires_grad_()
        weight.grad = torch.zeros_like(weight)

        def function(given: Mapping[str, Tensor]) -> Tensor:
            loss = torch.nn.functional.dropout(given["x"] @ weight.t(), 0.5).square().sum()
            loss.backward()
            return loss.detach()

        found = []
        for warmups in (100, 2):
            weight.grad.zero_()
            captured = Captured(function, lambda: CudaRecorder(device), warmups)
            torch.cuda.manual_seed(3)
            losses = [captured({"x": inputs(seed)["x"].to(device)}).clone() for seed in range(6)]
            found.append((torch.stack(losses), weight.grad.clone()))
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    finally:
        torch.cuda.set_stream(before)
