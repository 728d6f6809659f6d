# SPDX-License-Identifier: Apache-2.0
"""What the actions of a pipeline compute: forward passes of stages, and backward passes from what they left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from parallel.pipeline.actions import Action, ActionKind, Backward, Schedule
from parallel.pipeline.stage import Stage
from parallel.weight_gradients import WeightGradientQueue, deferring

#: Runs the forward pass of (stage, received activation or None, microbatch). The last stage returns the scalar loss, or
#: None where no backward pass follows.
StageForward = Callable[[int, Tensor | None, int], Tensor | None]
#: Computes an action, given the tensor that it takes of a neighboring stage, if any; what the next one takes, if any.
Compute = Callable[[Action, Tensor | None], Tensor | None]


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


@dataclass
class _Held:
    """What a stage keeps of a microbatch between forward and backward.

    The output itself is not kept: backward needs the edge of the graph that led to it, and the sent tensor can go.
    """

    received: Tensor | None
    root: Tensor | GradientEdge
    queue: WeightGradientQueue | None


class Passes:
    """Computes actions one after the other, and keeps what one leaves for the next of the same stage and microbatch.

    Args:
        schedule: of the pipeline.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._held: dict[tuple[int, int], _Held] = {}
        self._queues: dict[tuple[int, int], WeightGradientQueue] = {}

    def run(self, action: Action, taken: Tensor | None, forward: StageForward) -> Tensor | None:
        """Compute an action; see :data:`Compute`.

        Args:
            action: what to compute.
            taken: what it takes of a neighboring stage.
            forward: of the rank's stages.
        """
        place = action.stage, action.microbatch
        match action.kind:
            case ActionKind.FORWARD:
                return self._forward(place, taken, forward)
            case ActionKind.BACKWARD | ActionKind.BACKWARD_INPUT:
                held = self._held.pop(place)
                gradient = self._backward(held, taken)
                # Only the queue stays: the graph would keep the stage's input and its gradient, which can go once sent.
                if held.queue is not None:
                    self._queues[place] = held.queue
                return gradient
            case ActionKind.BACKWARD_WEIGHT:
                self._queues.pop(place).run()
                return None

    def _forward(self, place: tuple[int, int], received: Tensor | None, forward: StageForward) -> Tensor | None:
        training = self.schedule.backward is not Backward.NONE
        if received is not None and training:
            received = received.detach().requires_grad_()
        queue = WeightGradientQueue() if self.schedule.backward is Backward.SPLIT else None
        stage, microbatch = place
        with deferring(queue):
            output = forward(stage, received, microbatch)
        is_last = stage == self.schedule.stages - 1
        if training:
            assert output is not None, "a last stage has a loss, and others an activation"
            self._held[place] = _Held(received, output if is_last else get_gradient_edge(output), queue)
        return None if is_last or output is None else output.detach()

    @staticmethod
    def _backward(held: _Held, gradient: Tensor | None) -> Tensor | None:
        """The backward pass from a stage's output to its input; returns the input's gradient."""
        with deferring(held.queue):
            torch.autograd.backward([held.root], [gradient])  # type: ignore[arg-type]
        return None if held.received is None else held.received.grad
