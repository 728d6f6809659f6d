# SPDX-License-Identifier: Apache-2.0
"""Runs a pipeline schedule: exactly the actions of this rank's list, and the messages they imply."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.data_parallel import keep_gradients, reduce_gradients, set_gradient_sync
from parallel.pipeline.actions import Action, ActionKind, Schedule
from parallel.pipeline.chart import text_grid
from parallel.pipeline.communication import Message, Step, plan_communication
from parallel.pipeline.p2p import PipelineTransport
from parallel.pipeline.passes import Compute, Passes, StageForward
from parallel.pipeline.simulate import TimedAction, simulate
from parallel.presence import sign, waits_for_others
from parallel.step_clock import StepClock

#: Shape of the activation that enters any but the first stage, for a microbatch.
ActivationShape = Callable[[int], tuple[int, ...]]


class PipelineError(RuntimeError):
    """An action failed or timed out; the message holds the schedule's grid with the action marked."""


@dataclass
class _StepState:
    """What a rank holds in the middle of a step."""

    compute: Compute
    shape: ActivationShape
    after: Callable[[Action], None] | None
    receives: dict[Message, tuple[dist.Work, Tensor]] = field(default_factory=dict)
    sends: dict[Message, tuple[dist.Work, Tensor]] = field(default_factory=dict)
    handed_over: dict[Action, Tensor] = field(default_factory=dict)
    doing: str = ""


class PipelineEngine:
    """Runs one rank's part of a schedule, step after step.

    Args:
        schedule: the schedule of the whole pipeline.
        stages: this rank's stages by global index, as modules (for their data-parallel gradient reduction).
        transport: to the other pipeline ranks; None for a pipeline of one.
        dtype: of activations and their gradients.
        record: take the time of every action; all ranks then start each step together, and on CUDA the device is
            waited for around each action, which costs overlap.
        clock: takes the time of the computation; None to take none.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        stages: Mapping[int, nn.Module],
        transport: PipelineTransport | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        record: bool = False,
        clock: StepClock | None = None,
    ) -> None:
        assert set(stages) == set(schedule.stages_of(rank)), "a rank has the stages that the schedule places on it"
        self.schedule, self.rank, self.stages, self.transport = schedule, rank, stages, transport
        self.dtype, self.device, self.record, self.clock = dtype, device, record, clock
        self.plan = plan_communication(schedule)[rank]
        self._last_backward = schedule.last_backward(rank)
        self.recorded: list[TimedAction] = []
        self.step_began = 0.0
        #: Called after each action that :meth:`run` computes; None calls nothing.
        self.after_action: Callable[[Action], None] | None = None

    def run(self, forward: StageForward, shape: ActivationShape) -> None:
        """Run one step.

        Args:
            forward: of this rank's stages.
            shape: of activations.

        Raises:
            PipelineError: an action of this rank failed, or a message did not come.
        """
        passes = Passes(self.schedule)
        self.run_passes(lambda action, taken: passes.run(action, taken, forward), shape, after=self.after_action)

    def run_passes(
        self, compute: Compute, shape: ActivationShape, *, after: Callable[[Action], None] | None = None
    ) -> None:
        """Run one step whose actions are computed in any way.

        Args:
            compute: an action of this rank.
            shape: of activations.
            after: called after each action.

        Raises:
            PipelineError: an action of this rank failed, or a message did not come.
        """
        sign()
        state = _StepState(compute, shape, after)
        if self.record:
            # Ranks leave the barrier together, which makes times of different hosts comparable.
            dist.barrier()
            self.recorded.clear()
            self.step_began = self._now()
        action: Action | None = None
        try:
            for step in self.plan.steps:
                action = step.action
                self._run_step(step, state)
            self._finish(self.plan.finish, state)
        except Exception as error:
            raise PipelineError(self._describe(action, state.doing, error)) from error

    def _run_step(self, step: Step, state: _StepState) -> None:
        action = step.action
        for message in step.post:
            state.doing = f"posting the receive of the {message}"
            self._post(message, state)
        taken = self._take(step, state)
        self._finish(step.finish, state)
        state.doing = "computing"
        began = self._now()
        with nullcontext() if self.clock is None else self.clock.on_device():
            produced = self._compute(action, taken, state)
        if state.after is not None:
            state.after(action)
        if self.record:
            self.recorded.append(TimedAction(self.rank, action, began, self._now()))
        if produced is None:
            return
        if step.send is not None:
            assert self.transport is not None
            state.doing = f"sending the {step.send}"
            produced = produced.contiguous()
            state.sends[step.send] = (self.transport.send(produced, step.send.channel), produced)
        else:
            consumer = self.schedule.consumer(action)
            if consumer is not None:  # the next stage is on this rank too
                state.handed_over[consumer] = produced

    def _post(self, message: Message, state: _StepState) -> None:
        assert self.transport is not None
        buffer = torch.empty(state.shape(message.microbatch), dtype=self.dtype, device=self.device)
        state.receives[message] = (self.transport.receive(buffer, message.channel), buffer)

    @waits_for_others
    def _take(self, step: Step, state: _StepState) -> Tensor | None:
        """The tensor an action works on: received, handed over by a stage on this rank, or none."""
        if step.receive is None:
            return state.handed_over.pop(step.action, None)
        state.doing = f"waiting for the {step.receive}"
        work, buffer = state.receives.pop(step.receive)
        work.wait()
        return buffer

    @waits_for_others
    def _finish(self, messages: tuple[Message, ...], state: _StepState) -> None:
        for message in messages:
            state.doing = f"finishing the send of the {message}"
            work, _ = state.sends.pop(message)
            work.wait()

    def _compute(self, action: Action, taken: Tensor | None, state: _StepState) -> Tensor | None:
        stage, last = self.stages[action.stage], self._last_backward.get(action.stage) == action
        if action.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT):
            set_gradient_sync(stage, last=last)
        produced = state.compute(action, taken)
        if action.kind is ActionKind.BACKWARD_WEIGHT:
            keep_gradients(stage)
            if last:
                reduce_gradients(stage)
        return produced

    def _now(self) -> float:
        if self.record and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _describe(self, action: Action | None, doing: str, error: Exception) -> str:
        grid = text_grid(simulate(self.schedule), failed=None if action is None else (self.rank, action))
        return (
            f"pipeline rank {self.rank} (rank {dist.get_rank()}) failed at {action} of schedule "
            f"{self.schedule.name}, while {doing}: {type(error).__name__}: {error}\n{grid}"
        )
