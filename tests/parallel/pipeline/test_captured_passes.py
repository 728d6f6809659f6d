# SPDX-License-Identifier: Apache-2.0
"""Actions of a pipeline as graphs: they give what plain ones give, in as many slots as micro batches are in flight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.captured import CudaRecorders, Recorders, on_own_stream
from parallel.pipeline.actions import Action, ActionKind, Backward, Schedule, slots_in_flight
from parallel.pipeline.captured_passes import CapturedPasses
from parallel.pipeline.engine import PipelineEngine
from parallel.pipeline.schedules import SCHEDULES, build_schedule
from tests.parallel.pipeline.grid import every_schedule
from tests.parallel.pipeline.stages import SIZE, ToyStage, gradients_of, make_engine
from tests.parallel.support import uniform
from tests.parallel.tape import Tapes
from tests.worlds import run_world

KINDS = [*((name, kind.default_chunks) for name, kind in SCHEDULES.items()), ("interleaved-1f1b", 3)]
TOKENS, STEPS = 4, 3


def _most_held(actions: tuple[Action, ...]) -> Counter[int]:
    """The most micro batches that each stage of a rank holds at once."""
    held: Counter[int] = Counter()
    most: Counter[int] = Counter()
    for action in actions:
        held[action.stage] += action.kind is ActionKind.FORWARD
        most[action.stage] = max(most[action.stage], held[action.stage])
        held[action.stage] -= action.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT)
    return most


def test_a_stage_has_as_many_slots_as_it_holds_micro_batches() -> None:
    for schedule in every_schedule():
        if schedule.backward is Backward.NONE:
            continue
        for actions in schedule.actions:
            slots = slots_in_flight(actions)
            assert set(slots) == set(actions)
            holders: dict[tuple[int, int], int] = {}
            for action in actions:
                place = action.stage, slots[action]
                if action.kind is ActionKind.FORWARD:
                    assert place not in holders, f"{action} of {schedule.name} takes a slot that is taken"
                    holders[place] = action.microbatch
                assert holders[place] == action.microbatch
                if action.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT):
                    del holders[place]
            for stage, most in _most_held(actions).items():
                assert {slot for action, slot in slots.items() if action.stage == stage} == set(range(most))


class _Steps:
    """Steps over toy stages, whose micro batches have one shape, and the sum of their losses."""

    def __init__(self, engine: PipelineEngine) -> None:
        self.engine, self.schedule = engine, engine.schedule
        self.losses = torch.zeros((), dtype=torch.float64, device=engine.device)
        for stage in engine.stages.values():
            for parameter in stage.parameters():
                parameter.grad = torch.zeros_like(parameter)

    def tensors(self, step: int, index: int) -> dict[str, Tensor]:
        seeds = {name: 100 * step + 10 * index + i for i, name in enumerate(("x", "target"))}
        return {name: uniform(TOKENS, SIZE, seed=seed).to(self.engine.device) for name, seed in seeds.items()}

    def forward(self, stage: int, received: Tensor | None, given: Mapping[str, Tensor]) -> Tensor:
        out: Tensor = self.engine.stages[stage](given["x"] if received is None else received)
        if stage < self.schedule.stages - 1:
            return out
        loss = (out - given["target"]).square().sum()
        self.losses.add_(loss.detach())
        return loss

    def plain_forward(
        self, tensors: Callable[[int], dict[str, Tensor]], stage: int, received: Tensor | None, index: int
    ) -> Tensor:
        return self.forward(stage, received, tensors(index))

    def shape(self, _: int) -> tuple[int, ...]:
        return TOKENS, SIZE


def _run(
    engine: PipelineEngine, recorders: Recorders | None, plain_steps: int = 0
) -> tuple[Tensor, dict[str, Tensor], CapturedPasses | None]:
    """Losses and gradients of some steps, with graphs if there is what records them."""
    steps, passes = _Steps(engine), None
    for step in range(STEPS):
        tensors = partial(steps.tensors, step)
        if recorders is None or step < plain_steps:
            engine.run(partial(steps.plain_forward, tensors), steps.shape)
            continue
        if passes is None:
            passes = CapturedPasses(engine.schedule, engine.rank, engine.stages, steps.forward, recorders)
            passes.record(steps.tensors(0, 0), torch.zeros(TOKENS, SIZE, dtype=torch.float64, device=engine.device))
        engine.run_passes(partial(passes.run, tensors=tensors), steps.shape)
    return steps.losses, gradients_of(dict(engine.stages)), passes


def _both(schedule: Schedule) -> list[tuple[Tensor, dict[str, Tensor]]]:
    tapes = Tapes()
    plain, replayed = (_run(make_engine(schedule)[0], recorders)[:2] for recorders in (None, tapes))
    actions = schedule.actions[dist.get_rank()]
    assert len(tapes.made) == (1 + len(schedule.backward.kinds)) * sum(_most_held(actions).values())
    assert sum(tape.replays for tape in tapes.made) == STEPS * len(actions)
    return [plain, replayed]


def _all(schedules: list[Schedule]) -> list[list[tuple[Tensor, dict[str, Tensor]]]]:
    return [_both(schedule) for schedule in schedules]


@pytest.mark.parametrize(("ranks", "count"), [(1, 3), (2, 6), (3, 6)])
def test_losses_and_gradients_are_those_of_plain_passes(ranks: int, count: int) -> None:
    """To the last bit, with messages outside of the graphs; what other graphs may destroy, the tapes do."""
    schedules = [build_schedule(name, ranks, count, chunks) for name, chunks in KINDS]
    for outcomes in run_world(ranks, _all, schedules, timeout=240):
        for schedule, (plain, replayed) in zip(schedules, outcomes, strict=True):
            assert torch.equal(plain[0], replayed[0]), schedule.name
            assert plain[1].keys() == replayed[1].keys()
            for key, gradient in plain[1].items():
                assert torch.equal(gradient, replayed[1][key]), (schedule.name, key)
                assert gradient.any(), key


@pytest.mark.parametrize("name", ["1f1b", "zero-bubble-h1", "zero-bubble-v", "interleaved-1f1b"])
def test_more_micro_batches_of_a_step_take_no_more_slots(name: str) -> None:
    few, many = (build_schedule(name, 4, count) for count in (16, 64))
    for rank in range(4):
        assert _most_held(few.actions[rank]) == _most_held(many.actions[rank])


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "chunks"), KINDS)
def test_cuda_graphs_of_every_schedule_on_one_rank(name: str, chunks: int) -> None:
    """GPipe holds all of its micro batches there, in slots of their own, and stages of one rank hand over."""
    device, before = torch.device("cuda", 0), torch.cuda.current_stream()
    on_own_stream(device)
    try:
        found = []
        for recorders in (None, CudaRecorders(device)):
            schedule = build_schedule(name, 1, 4, chunks)
            stages = {number: ToyStage(number).to(device) for number in schedule.stages_of(0)}
            engine = PipelineEngine(schedule, 0, stages, None, dtype=torch.float64, device=device)
            found.append(_run(engine, recorders, plain_steps=1)[:2])
        (losses, gradients), replayed = found
        torch.testing.assert_close(replayed[0], losses, rtol=1e-12, atol=0)
        torch.testing.assert_close(replayed[1], gradients, rtol=1e-12, atol=1e-12)
    finally:
        torch.cuda.set_stream(before)
