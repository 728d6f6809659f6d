# SPDX-License-Identifier: Apache-2.0
"""The engine runs exactly the actions of its lists, with no more memory and arithmetic than they imply."""

from __future__ import annotations

import gc
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from parallel.pipeline.actions import Action, ActionKind, Schedule
from parallel.pipeline.engine import PipelineEngine, PipelineError
from parallel.pipeline.p2p import PipelineTransport
from parallel.pipeline.schedules import SCHEDULES, build_schedule, forward_only
from tests.parallel.pipeline.grid import action_of, receive_buffers, send_buffers
from tests.parallel.pipeline.stages import PRODUCTS, ToyStage, ToyStep, gradients_of, make_engine, plain_step
from tests.parallel.support import EPS64, Operators
from tests.worlds import CPU, GRACE, Together, make_mesh, run_world

#: Float64 sums of some dozen terms of size one to a hundred, in another order on each side.
CLOSE = {"rtol": 1e4 * EPS64, "atol": 1e4 * EPS64}

KINDS = [*((name, kind.default_chunks) for name, kind in SCHEDULES.items()), ("interleaved-1f1b", 3)]
EVERY_KIND = pytest.mark.parametrize(("name", "chunks"), KINDS)


def _steps(
    name: str, chunks: int, ranks: int, counts: tuple[int, ...]
) -> list[tuple[dict[int, float], dict[str, Tensor]]]:
    results = []
    for count in counts:
        engine, step = make_engine(build_schedule(name, ranks, count, chunks))
        engine.run(step.forward, step.shape)
        results.append((step.losses, gradients_of(step.stages)))
    return results


COUNTS = [(1, (1, 3)), (2, (1, 2, 5)), (3, (2, 6)), (4, (3, 4, 9))]


@EVERY_KIND
@pytest.mark.parametrize(("ranks", "counts"), COUNTS)
def test_losses_and_gradients_are_those_of_one_process(name, chunks, ranks, counts):
    schedules = [build_schedule(name, ranks, count, chunks) for count in counts]
    per_rank = WORLDS(ranks, _steps, name, chunks, ranks, counts)
    for schedule, outcomes in zip(schedules, zip(*per_rank, strict=True), strict=True):
        losses, gradients = plain_step(schedule)
        mine: dict[str, Tensor] = {}
        for rank, (seen, held) in enumerate(outcomes):
            assert bool(seen) == (rank == schedule.rank_of(schedule.stages - 1))
            if seen:
                assert seen == pytest.approx(losses, rel=1e4 * EPS64)
            mine |= held
        assert mine.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(mine[key], gradient, **CLOSE)


def _twice(schedule: Schedule) -> None:
    engine, step = make_engine(schedule)
    engine.run(step.forward, step.shape)
    once = {name: gradient.clone() for name, gradient in gradients_of(step.stages).items()}
    engine.run(step.forward, step.shape)
    for name, gradient in gradients_of(step.stages).items():
        torch.testing.assert_close(gradient, 2 * once[name], **CLOSE)


ADDED = ("1f1b", "zero-bubble-v")


@pytest.mark.parametrize("name", ADDED)
def test_gradients_of_a_second_step_are_added(name):
    WORLDS(2, _twice, build_schedule(name, 2, 3))


# ---------------------------------------------------------------- arithmetic


def _products(*built: Any) -> int:
    engine, step = make_engine(build_schedule(*built))
    with Operators() as operators:
        engine.run(step.forward, step.shape)
    return operators.count("mm", "addmm", "bmm", "matmul")


@EVERY_KIND
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_matrix_product_runs_once(name, chunks, ranks):
    schedule = build_schedule(name, ranks, 3, chunks)
    # Forward, input gradient and weight gradient of each.
    expected = 3 * PRODUCTS * 3 * schedule.chunks
    assert WORLDS(ranks, _products, name, ranks, 3, chunks) == [expected] * ranks


def _kept_back(schedule: Schedule) -> None:
    """Gradients of the parallel layers' weights come from the weight-gradient actions alone."""
    engine, step = make_engine(schedule)
    compute = engine._compute
    pending: list[Action] = []

    def watch(action: Action, *arguments: Any) -> Any:
        stage = step.stages[action.stage]
        weights = [stage.column.weight, stage.row.weight]
        before = [None if weight.grad is None else weight.grad.clone() for weight in weights]
        result = compute(action, *arguments)
        changed = [
            weight.grad is not None and (old is None or not torch.equal(old, weight.grad))
            for weight, old in zip(weights, before, strict=True)
        ]
        assert changed == [action.kind is ActionKind.BACKWARD_WEIGHT] * 2, action
        pending.append(action)
        return result

    engine._compute = watch
    engine.run(step.forward, step.shape)
    assert tuple(pending) == schedule.actions[dist.get_rank()]


DEFERRING = ("zero-bubble-h1", "zero-bubble-v")


@pytest.mark.parametrize("name", DEFERRING)
def test_weight_gradients_wait_for_their_action(name):
    WORLDS(2, _kept_back, build_schedule(name, 2, 4))


# ---------------------------------------------------------------- memory


class _WatchedTransport:
    """Passes messages on and remembers the memory they traveled in."""

    def __init__(self, inner: PipelineTransport) -> None:
        self.inner = inner
        self.received: list[StorageWeakRef] = []
        self.sent: list[StorageWeakRef] = []

    def send(self, tensor: Tensor, channel: Any) -> dist.Work:
        self.sent.append(StorageWeakRef(tensor.untyped_storage()))
        return self.inner.send(tensor, channel)

    def receive(self, buffer: Tensor, channel: Any) -> dist.Work:
        self.received.append(StorageWeakRef(buffer.untyped_storage()))
        return self.inner.receive(buffer, channel)


def _living(references: list[StorageWeakRef]) -> int:
    return sum(not reference.expired() for reference in references)


def _memory(schedule: Schedule) -> None:
    engine, step = make_engine(schedule)
    assert engine.transport is not None
    watched = _WatchedTransport(engine.transport)
    engine.transport = watched  # type: ignore[assignment]
    compute, activations = engine._compute, 0
    most_sent = most_posted = 0

    def watch(action: Action, taken: Tensor | None, state: Any) -> Tensor | None:
        nonlocal activations, most_sent, most_posted
        # What was received for this action lives, what is posted, and one buffer of each microbatch still held: its
        # input until the backward pass, then, while its weight gradients wait, the gradient of its output.
        posted = len(state.receives)
        assert posted + (action.kind is not ActionKind.BACKWARD_WEIGHT) <= receive_buffers(engine.plan) + 1
        alive = _living(watched.received), _living(watched.sent)
        assert alive[0] <= posted + 1 + activations, (action, alive, posted, activations)
        # An output lives as long as its send; nothing else holds on to it.
        assert alive[1] == len(state.sends), (action, alive, list(map(str, state.sends)))
        most_sent, most_posted = max(most_sent, len(state.sends)), max(most_posted, posted)
        result = compute(action, taken, state)
        activations += {"F": 1, "I": 0, "B": -1, "W": -1}[action.kind]
        return result

    engine._compute = watch  # type: ignore[method-assign]
    engine.run(step.forward, step.shape)
    assert most_sent <= send_buffers(engine.plan)
    assert most_posted <= receive_buffers(engine.plan) < schedule.microbatches
    gc.collect()
    assert watched.received
    assert _living(watched.received) == 0
    assert _living(watched.sent) == 0


@EVERY_KIND
def test_buffers_and_outputs_live_no_longer_than_planned(name, chunks):
    WORLDS(3, _memory, build_schedule(name, 3, 9, chunks))


# ---------------------------------------------------------------- evaluation, recording


def _forward_only(schedule: Schedule, training: Schedule) -> tuple[dict[int, float], list[str]]:
    engine, step = make_engine(schedule)
    with torch.no_grad():
        engine.run(step.forward, step.shape)
    assert all(parameter.grad is None for stage in step.stages.values() for parameter in stage.parameters())
    # The same stages still train: evaluation leaves nothing behind.
    trainer = PipelineEngine(training, engine.rank, step.stages, engine.transport, dtype=torch.float64, device=CPU)
    again = ToyStep(training, step.stages)
    trainer.run(again.forward, again.shape)
    assert again.losses == step.losses
    return step.losses, [str(action) for action in engine.schedule.actions[engine.rank]]


def _evaluated(name: str, ranks: int) -> tuple[Schedule, Schedule]:
    training = build_schedule(name, ranks, 4)
    return forward_only(ranks, 4, training.chunks, training.placement), training


EVALUATED = ("1f1b", "interleaved-1f1b", "zero-bubble-v")


@pytest.mark.parametrize("name", EVALUATED)
@pytest.mark.parametrize("ranks", [1, 3])
def test_forward_only_on_the_stages_of_a_training_schedule(name, ranks):
    schedule, training = _evaluated(name, ranks)
    outcomes = WORLDS(ranks, _forward_only, schedule, training)
    losses, _ = plain_step(schedule)
    assert outcomes[schedule.rank_of(schedule.stages - 1)][0] == pytest.approx(losses, rel=1e4 * EPS64)


def _recorded(schedule: Schedule) -> None:
    engine, step = make_engine(schedule, record=True)
    for _ in range(2):
        began = time.perf_counter()
        engine.run(step.forward, step.shape)
        assert [event.action for event in engine.recorded] == list(schedule.actions[engine.rank])
        moments = [engine.step_began, *(t for event in engine.recorded for t in (event.start, event.end))]
        assert moments == sorted(moments)
        assert began <= moments[0]
        assert {event.rank for event in engine.recorded} == {engine.rank}


def test_the_timeline_of_the_last_step_is_kept():
    WORLDS(2, _recorded, build_schedule("zero-bubble-h1", 2, 3))


#: Of all tests above. A test of a failure, below, ends its world.
WORLDS = Together(
    *((ranks, _steps, *kind, ranks, counts) for ranks, counts in COUNTS for kind in KINDS),
    *((2, _twice, build_schedule(name, 2, 3)) for name in ADDED),
    *((ranks, _products, name, ranks, 3, chunks) for ranks in (1, 2) for name, chunks in KINDS),
    *((2, _kept_back, build_schedule(name, 2, 4)) for name in DEFERRING),
    *((3, _memory, build_schedule(name, 3, 9, chunks)) for name, chunks in KINDS),
    *((ranks, _forward_only, *_evaluated(name, ranks)) for ranks in (1, 3) for name in EVALUATED),
    (2, _recorded, build_schedule("zero-bubble-h1", 2, 3)),
    most=20,
)


# ---------------------------------------------------------------- failures


class _Broken(ToyStage):
    """Fails at one call of its forward pass, or of the backward pass that follows."""

    def __init__(self, number: int, call: int, backward: bool) -> None:
        super().__init__(number)
        self.calls, self.call, self.backward = 0, call, backward

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out = super().forward(x)
        if self.calls == self.call + 1:
            if not self.backward:
                raise ArithmeticError("the stage broke")
            out.register_hook(self._break)
        return out

    def _break(self, _gradient: Tensor) -> None:
        raise ArithmeticError("the stage broke")


def _failing(schedule: Schedule, action: Action) -> str:
    engine, step = make_engine(schedule)
    if action.stage in step.stages:
        broken = _Broken(action.stage, action.microbatch, action.kind is not ActionKind.FORWARD)
        step.stages[action.stage] = broken
    with pytest.raises(PipelineError) as caught:
        engine.run(step.forward, step.shape)
    if action.stage in step.stages:
        assert isinstance(caught.value.__cause__, ArithmeticError)
    # Returning ends this process's part of the group, which is how the others learn of it.
    return str(caught.value)


def _lines(message: str) -> tuple[str, list[str]]:
    first, *grid = message.splitlines()
    return first, grid


@pytest.mark.parametrize(
    ("name", "text"), [("1f1b", "1F2"), ("1f1b", "1B1"), ("zero-bubble-h1", "1I0"), ("zero-bubble-v", "2F1")]
)
def test_the_rank_that_fails_says_where(name, text):
    schedule, action = build_schedule(name, 2, 4), action_of(text)
    rank = schedule.rank_of(action.stage)
    messages = run_world(2, _failing, schedule, action, timeout=60)
    first, grid = _lines(messages[rank])
    assert first == (
        f"pipeline rank {rank} (rank {rank}) failed at {text} of schedule {name}, while computing: "
        "ArithmeticError: the stage broke"
    )
    assert len(grid) == 2
    assert grid[rank].count(f">{text}<") == 1
    assert ">" not in grid[1 - rank]
    # The neighbor waits for something that never comes, and says for what.
    first, grid = _lines(messages[1 - rank])
    assert first.startswith(f"pipeline rank {1 - rank} (rank {1 - rank}) failed at ")
    assert "while waiting for the " in first or "while finishing the send of the " in first
    assert f"(rank {rank})" in first
    assert grid[1 - rank].count(">") == 1


def _silent(schedule: Schedule, silent: int) -> str:
    rank = dist.get_rank()
    mesh = make_mesh(pipeline=2)
    up, down = (dist.new_group([0, 1], timeout=timedelta(seconds=1)) for _ in range(2))
    stages = {rank: ToyStage(rank)}
    transport = PipelineTransport((0, 1), up, down)
    engine = PipelineEngine(schedule, rank, stages, transport, dtype=torch.float64, device=CPU)
    step = ToyStep(schedule, stages)
    said = ""
    if rank != silent:
        with pytest.raises(PipelineError) as caught:
            engine.run(step.forward, step.shape)
        said = str(caught.value)
    mesh.all_reduce(torch.zeros(1), ("pipeline",))  # the silent rank lives, and does nothing else
    return said


@pytest.mark.parametrize(
    ("silent", "action", "doing"),
    [
        (0, "1F0", "waiting for the activation of microbatch 0 from stage 0 (rank 0) to stage 1 (rank 1)"),
        (1, "0F1", "finishing the send of the activation of microbatch 0 from stage 0 (rank 0) to stage 1 (rank 1)"),
    ],
)
def test_a_rank_that_hangs_is_noticed_by_the_timeout(silent, action, doing):
    waiting = 1 - silent
    first, grid = _lines(run_world(2, _silent, build_schedule("1f1b", 2, 2), silent)[waiting])
    where = f"pipeline rank {waiting} (rank {waiting}) failed at {action} of schedule 1f1b"
    assert first.startswith(f"{where}, while {doing}: RuntimeError: ")
    assert "Timed out" in first
    assert f">{action}<" in grid[waiting]


def _timeouts() -> list[timedelta]:
    transport = PipelineTransport.create(make_mesh(pipeline=2))
    assert transport is not None
    return [group._get_backend(CPU).options._timeout for group in (transport.up, transport.down)]


def test_messages_wait_as_long_as_the_run_allows():
    waited = timedelta(seconds=77 + GRACE)
    assert run_world(2, _timeouts, timeout=77.0) == [[waited] * 2] * 2


def test_stages_of_another_rank_are_refused():
    schedule = build_schedule("1f1b", 2, 2)
    with pytest.raises(AssertionError, match="the stages that the schedule places on it"):
        PipelineEngine(schedule, 0, {1: ToyStage(1)}, None, dtype=torch.float64, device=CPU)
