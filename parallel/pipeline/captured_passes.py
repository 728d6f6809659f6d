# SPDX-License-Identifier: Apache-2.0
"""The actions of a pipeline as graphs that are recorded once; messages between stages stay outside of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from parallel.captured import Captured, Recorders
from parallel.data_parallel import (
    arriving_weights,
    begin_next_sum,
    holding_for_weights,
    marking_sums,
    set_gradient_sync,
)
from parallel.pipeline.actions import Action, ActionKind, Schedule, slots_in_flight
from parallel.pipeline.passes import Passes

#: Runs the forward pass of (stage, received activation or None, tensors of a micro batch).
TensorForward = Callable[[int, Tensor | None, Mapping[str, Tensor]], Tensor]
#: What an action takes of a neighboring stage, among its tensors.
_TAKEN = "taken by the action"


class CapturedPasses:
    """Computes the actions of a rank by replaying graphs, one for each kind of action, stage and slot.

    The micro batches that a stage holds at once have different slots (:func:`slots_in_flight`), whose graphs read and
    write places of their own. What the graphs of a slot leave for each other lies in a pool of memory of the slot. The
    last ones leave nothing but gradients of parameters, and share one pool. So memory grows with the micro batches in
    flight, and not with those of a step.

    Args:
        schedule: of the whole pipeline.
        rank: this one's place in it.
        stages: this rank's, by global index.
        forward: of the stages.
        recorders: of the device.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        stages: Mapping[int, nn.Module],
        forward: TensorForward,
        recorders: Recorders,
    ) -> None:
        self.schedule, self.stages, self.forward, self.recorders = schedule, stages, forward, recorders
        self.slots = slots_in_flight(schedule.actions[rank])
        self._last_backward = schedule.last_backward(rank)
        self.graphs: dict[tuple[ActionKind, int, int], Captured] = {}

    def record(self, like: Mapping[str, Tensor], activation: Tensor) -> None:
        """Record all graphs, and compute nothing. No messages may be on their way.

        Args:
            like: the tensors of a micro batch, all of which have the same shapes.
            activation: like those that stages send each other.
        """
        shared = self.recorders.pool()
        kinds = (ActionKind.FORWARD, *self.schedule.backward.kinds)
        for stage, slot in sorted({(action.stage, slot) for action, slot in self.slots.items()}):
            set_gradient_sync(self.stages[stage], last=False)
            passes, own = Passes(self.schedule), self.recorders.pool()
            for kind in kinds:
                recorder = self.recorders.recorder(shared if kind is kinds[-1] else own)
                action = Action(kind, stage, slot)
                given = dict(like) if kind is ActionKind.FORWARD else {}
                if self.schedule.producer(action) is not None:
                    given[_TAKEN] = activation
                # Gradients that are complete on the way can be summed over data ranks behind the rest, and weights that
                # are needed on the way can arrive meanwhile.
                mark = recorder.mark if kind is ActionKind.BACKWARD else None
                hold = recorder.hold if kind is ActionKind.FORWARD else None
                with marking_sums(self.stages[stage], mark), holding_for_weights(self.stages[stage], hold):
                    graph = Captured(partial(self._compute, passes, action), recorder, given)
                self.graphs[kind, stage, slot] = graph

    def _compute(self, passes: Passes, action: Action, given: Mapping[str, Tensor]) -> Tensor | None:
        return passes.run(action, given.get(_TAKEN), lambda stage, received, _: self.forward(stage, received, given))

    def run(
        self, action: Action, taken: Tensor | None, tensors: Callable[[int], Mapping[str, Tensor]]
    ) -> Tensor | None:
        """Compute an action; see :data:`~parallel.pipeline.passes.Compute`.

        Args:
            action: what to compute.
            taken: what it takes of a neighboring stage.
            tensors: those of a micro batch of the step, by its number.
        """
        given = dict(tensors(action.microbatch)) if action.kind is ActionKind.FORWARD else {}
        if taken is not None:
            given[_TAKEN] = taken
        stage = self.stages[action.stage]
        last = action == self._last_backward.get(action.stage)
        behind = partial(begin_next_sum, stage) if last else None
        ahead = partial(next, arriving_weights(stage)) if action.kind is ActionKind.FORWARD else None
        result = self.graphs[action.kind, action.stage, self.slots[action]](given, behind, ahead)
        # The next replay overwrites it, perhaps while it is still being sent.
        return None if result is None else result.clone()
