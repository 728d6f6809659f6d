# SPDX-License-Identifier: Apache-2.0
"""Memory of a rank by part, at the peak of steps that are logged."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_bert.training.run_state import RunState
from parallel.object_collectives import gather_objects
from parallel.pipeline.actions import Action, ActionKind

#: Parts of memory in the order in which they are reported. ``buffers`` are all that the others are not: what backward
#: pass and optimizer make and drop again, gathered weights, buffers of collectives, and micro batches.
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
PEAK = "peak"


class Allocator(Protocol):
    """What hands memory out, and counts it in bytes."""

    def allocated(self) -> int:
        """Held by tensors now."""

    def peak(self) -> int:
        """The most that was held since :meth:`restart`."""

    def reserved(self) -> int:
        """Held at all, by tensors, by graphs, and for what comes."""

    def restart(self) -> None:
        """Forget the peak."""


class GpuAllocator:
    """Torch's allocator of GPU memory; asking does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocated(self) -> int:
        """Held by tensors now."""
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """The most that was held since :meth:`restart`."""
        return torch.cuda.max_memory_allocated(self.device)

    def reserved(self) -> int:
        """Held at all, by tensors, by graphs, and for what comes."""
        return torch.cuda.memory_reserved(self.device)

    def restart(self) -> None:
        """Forget the peak."""
        torch.cuda.reset_peak_memory_stats(self.device)


def resident_peak() -> int:
    """Bytes of the most memory that this process has had so far, of whatever kind."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class MemoryMeter:
    """Says what the memory of a rank was for when it was most in a step.

    Weights, gradients and optimizer states are what their tensors take. With an allocator that counts, activations and
    logits are what there is more than before the step when a forward pass ends, where that is most: ``logits`` are what
    heads and losses hold of it, rows of hidden states included; and the peak is that of the step. FSDP's gathered
    weights are activations there. Where micro batches are replayed as a graph, no forward pass ends for the host: the
    peak is then all that the allocator has reserved, and activations and logits count as buffers.

    Without such an allocator, on processors, the peak is that of the whole process so far, and all that is neither
    weights, gradients nor optimizer states counts as buffers: libraries and data, too.

    Args:
        trainer: whose steps they are.
        allocator: that counts; None where there is none.

    Attributes:
        parts: bytes by part, and of the peak, of the last step that was measured.
    """

    def __init__(self, trainer: RunState, allocator: Allocator | None = None) -> None:
        self.trainer, self.allocator = trainer, allocator
        if allocator is None and trainer.world.device.type == "cuda":
            self.allocator = GpuAllocator(trainer.world.device)
        self.parts: dict[str, int] = {}

    @contextmanager
    def measuring(self, due: bool = True) -> Iterator[None]:
        """The block is a step."""
        if not due:
            yield
            return
        states = self.trainer.optimizer.held_bytes()
        if self.allocator is None:
            yield
            self._take(states, {}, resident_peak())
            return
        self.allocator.restart()
        points = _Points(self.trainer, self.allocator)
        with points.followed():
            yield
        if points.forward:
            self._take(states, points.parts(), self.allocator.peak())
        else:
            self._take(states, {}, self.allocator.reserved())

    def _take(self, states: dict[str, int], found: dict[str, int], peak: int) -> None:
        parts = states | found
        parts["buffers"] = max(0, peak - sum(parts.values()))
        self.parts = {name: parts[name] for name in PARTS if name in parts} | {PEAK: peak}

    def read(self) -> dict[str, int]:
        """``memory_<part>`` in bytes of the rank whose peak is the highest, and with several, which; every rank calls.

        Empty before the first step that is measured.
        """
        if not self.parts:
            return {}
        everyone = gather_objects(self.parts)
        fullest = max(range(len(everyone)), key=lambda rank: everyone[rank][PEAK])
        found = {f"memory_{part}": size for part, size in everyone[fullest].items()}
        return found if len(everyone) == 1 else found | {"memory_rank": fullest}


class _Points:
    """Asks an allocator at the points of a step after which activations and logits are known."""

    def __init__(self, trainer: RunState, allocator: Allocator) -> None:
        self.trainer, self.allocator = trainer, allocator
        self.last_stage = trainer.engine.schedule.stages - 1
        self.first = self.most = allocator.allocated()
        self.before_heads = self.heads = 0
        #: What heads and losses keep, by micro batch.
        self.held: dict[int, int] = {}
        #: Whether gradients have a place between steps, or come with the first backward pass and are no activations.
        self.gradients_stay = bool(trainer.optimizer.buffers)
        self.forward = self.backward = False

    @contextmanager
    def followed(self) -> Iterator[None]:
        """The block is the step."""
        engine = self.trainer.engine
        with ExitStack() as stack:
            for stage in self.trainer.model.stages.values():
                encoder = stage.get_submodule("encoder")
                stack.callback(encoder.register_forward_hook(self._after_encoder).remove)
            engine.after_action = self._after_action
            stack.callback(setattr, engine, "after_action", None)
            yield

    def _after_encoder(self, module: nn.Module, inputs: Any, hidden: Tensor) -> None:  # noqa: ARG002
        # Heads select rows of the last hidden states, for which the backward pass does not need them.
        self.before_heads = self.allocator.allocated() - hidden.nbytes

    def _after_action(self, action: Action) -> None:
        last, forward = action.stage == self.last_stage, action.kind is ActionKind.FORWARD
        if not forward:
            self.backward = True
            if last and action.kind is self.trainer.engine.schedule.backward.kinds[0]:
                self.held.pop(action.microbatch)
            return
        self.forward = True
        now = self.allocator.allocated()
        if last:
            self.held[action.microbatch] = now - self.before_heads
        if now > self.most and (self.gradients_stay or not self.backward):
            self.most, self.heads = now, sum(self.held.values())

    def parts(self) -> dict[str, int]:
        """Activations and logits."""
        return {"activations": max(0, self.most - self.first - self.heads), "logits": self.heads}
