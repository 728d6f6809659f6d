# SPDX-License-Identifier: Apache-2.0
"""Runs a pipeline schedule: exactly the actions of this rank's list, and the messages they imply."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from parallel.data_parallel import keep_gradients, reduce_gradients, set_gradient_sync
from parallel.pipeline.actions import Action, ActionKind, Backward, Schedule
from parallel.pipeline.chart import text_grid
from parallel.pipeline.communication import Message, Step, plan_communication
from parallel.pipeline.p2p import PipelineTransport
from parallel.pipeline.simulate import TimedAction, simulate
from parallel.pipeline.stage import Stage
from parallel.presence import sign, waits_for_others
from parallel.step_clock import StepClock
from parallel.weight_gradients import WeightGradientQueue, deferring

#: Runs the forward pass of (stage, received activation or None, microbatch). The last stage returns the scalar loss, or
#: None where no backward pass follows.
StageForward = Callable[[int, Tensor | None, int], Tensor | None]
#: Shape of the activation that enters any but the first stage, for a microbatch.
ActivationShape = Callable[[int], tuple[int, ...]]


def forward_of(
    stages: Mapping[int, Stage],
    batches: Sequence[Any],
    at_end: Callable[[int, Any], Tensor | None],
    *,
    seed: int | None = None,
    began: Callable[[int, int], None] | None = None,
) -> StageForward:
    """The forward pass of stages over the micro batches of a step.

    Args:
        stages: this rank's, by global index.
        batches: what stages are called with, by micro batch.
        at_end: takes the number of a micro batch and what the last stage makes of it, where that is on this rank; its
            loss, or None where no backward pass follows.
        seed: of dropout masks; None switches dropout off.
        began: called with stage and micro batch before every forward pass.
    """

    def forward(number: int, received: Tensor | None, index: int) -> Tensor | None:
        if began is not None:
            began(number, index)
        stage = stages[number]
        output = stage(batches[index], seed, received)
        return at_end(index, output) if stage.part.last else output

    return forward


class PipelineError(RuntimeError):
    """An action failed or timed out; the message holds the schedule's grid with the action marked."""


@dataclass
class _Held:
    """What a stage keeps of a microbatch between forward and backward.

    The output itself is not kept: backward needs the edge of the graph that led to it, and the sent tensor can go.
    """

    received: Tensor | None
    root: Tensor | GradientEdge
    queue: WeightGradientQueue | None


@dataclass
class _StepState:
    """What a rank holds in the middle of a step."""

    forward: StageForward
    shape: ActivationShape
    receives: dict[Message, tuple[dist.Work, Tensor]] = field(default_factory=dict)
    sends: dict[Message, tuple[dist.Work, Tensor]] = field(default_factory=dict)
    handed_over: dict[Action, Tensor] = field(default_factory=dict)
    held: dict[tuple[int, int], _Held] = field(default_factory=dict)
    queues: dict[tuple[int, int], WeightGradientQueue] = field(default_factory=dict)
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
        last_kind = schedule.backward.kinds[-1] if schedule.backward.kinds else None
        self._last_backward = {action.stage: action for action in schedule.actions[rank] if action.kind is last_kind}
        self.recorded: list[TimedAction] = []
        self.step_began = 0.0
        #: Called after each action of this rank; None calls nothing.
        self.after_action: Callable[[Action], None] | None = None

    def run(self, forward: StageForward, shape: ActivationShape) -> None:
        """Run one step.

        Raises:
            PipelineError: an action of this rank failed, or a message did not come.
        """
        sign()
        state = _StepState(forward, shape)
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
        if self.after_action is not None:
            self.after_action(action)
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
        match action.kind:
            case ActionKind.FORWARD:
                return self._forward(action, taken, state)
            case ActionKind.BACKWARD:
                set_gradient_sync(self.stages[action.stage], last=self._last_backward[action.stage] == action)
                return self._backward(state.held.pop((action.stage, action.microbatch)), taken)
            case ActionKind.BACKWARD_INPUT:
                set_gradient_sync(self.stages[action.stage], last=False)
                held = state.held.pop((action.stage, action.microbatch))
                gradient = self._backward(held, taken)
                # Only the queue stays: the graph would keep the stage's input and its gradient, which can go once sent.
                assert held.queue is not None, "a split backward pass has a queue"
                state.queues[(action.stage, action.microbatch)] = held.queue
                return gradient
            case ActionKind.BACKWARD_WEIGHT:
                state.queues.pop((action.stage, action.microbatch)).run()
                keep_gradients(self.stages[action.stage])
                if self._last_backward[action.stage] == action:
                    reduce_gradients(self.stages[action.stage])
                return None

    def _forward(self, action: Action, received: Tensor | None, state: _StepState) -> Tensor | None:
        training = self.schedule.backward is not Backward.NONE
        if received is not None and training:
            received = received.detach().requires_grad_()
        queue = WeightGradientQueue() if self.schedule.backward is Backward.SPLIT else None
        with deferring(queue):
            output = state.forward(action.stage, received, action.microbatch)
        is_last = action.stage == self.schedule.stages - 1
        if training:
            assert output is not None, "a last stage has a loss, and others an activation"
            root = output if is_last else get_gradient_edge(output)
            state.held[(action.stage, action.microbatch)] = _Held(received, root, queue)
        return None if is_last or output is None else output.detach()

    @staticmethod
    def _backward(held: _Held, gradient: Tensor | None) -> Tensor | None:
        """The backward pass from a stage's output to its input; returns the input's gradient."""
        with deferring(held.queue):
            torch.autograd.backward([held.root], [gradient])  # type: ignore[arg-type]
        return None if held.received is None else held.received.grad

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
