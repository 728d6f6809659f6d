# SPDX-License-Identifier: Apache-2.0
"""Work of a GPU that is recorded once as a CUDA graph and replayed with other values.

A replay costs the host one launch, or a few, in place of thousands. What is recorded is the work alone: memory
addresses, sizes and numbers that Python knew are those of the recording, so inputs are copied to the same places, and
must have the same shapes; results and gradients come to be where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

#: Work that can be recorded: its result, if it has one, is filled by every replay.
Work = Callable[[], Tensor | None]


class Recorder(Protocol):
    """Records what a function queues on a device."""

    def record(self, work: Work) -> Tensor | None:
        """Record a function without doing its work; its result, which :meth:`replay` fills."""

    def mark(self) -> None:
        """While a function is being recorded: note that other work may begin here, behind what came before."""

    def hold(self) -> None:
        """While a function is being recorded: note that what comes now waits for other work, unlike what came before.

        Something must have come before.
        """

    def replay(self, behind: Callable[[], None] | None = None, ahead: Callable[[], None] | None = None) -> None:
        """Do the work once more.

        Args:
            behind: called for every mark, in their order. What it queues waits for the work before that mark alone, and
                the work after the mark does not wait for it.
            ahead: called for every hold, in their order. The work after that hold waits for what it waits for.
        """


class Recorders(Protocol):
    """Makes recorders, and the pools of memory that their work is done in.

    Work recorded later in a pool takes the memory that is free in it by then. So replays of a pool's recorders may each
    destroy what the later ones hold, and what was no longer needed when they were recorded.
    """

    def pool(self) -> Any:
        """Another pool."""

    def recorder(self, pool: Any) -> Recorder:
        """A recorder whose work is done in a pool."""


class CudaRecorder:
    """CUDA graphs, recorded on the current stream, which must not be the default one: one up to each hold.

    Dropout of fused attention draws from torch's generator: every replay goes on from where that is.

    Args:
        device: the GPU.
        pool: of memory.
        aside: a stream for what is queued behind marks.
    """

    def __init__(self, device: torch.device, pool: Any, aside: torch.cuda.Stream) -> None:
        self.device, self.pool, self.aside = device, pool, aside
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self._marks: list[torch.cuda.Event] = []

    def record(self, work: Work) -> Tensor | None:
        """Record a function without doing its work; its result, which :meth:`replay` fills."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        self._begin()
        try:
            return work()
        finally:
            self.graphs[-1].capture_end()

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        graph.register_generator_state(torch.cuda.default_generators[index])
        # Other threads may pin memory and ask for events meanwhile.
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        self.graphs.append(graph)

    def mark(self) -> None:
        """While a function is being recorded: note that other work may begin here, behind what came before."""
        # An external event is a node of the graph, which streams outside of it can wait for.
        self._marks.append(torch.cuda.Event(external=True))
        self._marks[-1].record()

    def hold(self) -> None:
        """While a function is being recorded: note that what comes now waits for other work."""
        # Between two graphs the stream waits as ever; a graph that waits for an event would see one of its record calls
        # or another, depending on how far the host is ahead.
        self.graphs[-1].capture_end()
        self._begin()

    def replay(self, behind: Callable[[], None] | None = None, ahead: Callable[[], None] | None = None) -> None:
        """Do the work once more; see :class:`Recorder`."""
        for number, graph in enumerate(self.graphs):
            if number and ahead is not None:
                ahead()
            graph.replay()
        if behind is None:
            return
        for mark in self._marks:
            self.aside.wait_event(mark)
            with torch.cuda.stream(self.aside):
                behind()


class CudaRecorders:
    """Makes CUDA graphs.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def aside(self) -> torch.cuda.Stream:
        """For what is queued behind marks."""
        return torch.cuda.Stream(self.device)

    def pool(self) -> Any:
        """Another pool of memory."""
        return torch.cuda.graph_pool_handle()

    def recorder(self, pool: Any) -> CudaRecorder:
        """A recorder whose work is done in a pool."""
        return CudaRecorder(self.device, pool, self.aside)


def on_own_stream(device: torch.device) -> None:
    """Let this thread queue its work on a stream that can be recorded: the default one cannot.

    To be called before parameters are made: their gradients are added on the stream that they were first used on. A
    stream of its own that the thread has already stays.
    """
    if device.type == "cuda" and torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        torch.cuda.set_stream(stream)


class Captured:
    """A function of tensors whose work is recorded once, and replayed at every call.

    It may change tensors beside its arguments, such as gradients that it adds to, if they stay where they are. It may
    neither wait for the device nor depend on anything else that changes between calls. Libraries and compilers set
    themselves up in the first calls of a function, which have to be made before it is recorded.

    Args:
        function: takes tensors by name, and returns one or none.
        recorder: of this function alone.
        like: what it will be called with, in shapes, formats and devices.
    """

    def __init__(
        self,
        function: Callable[[Mapping[str, Tensor]], Tensor | None],
        recorder: Recorder,
        like: Mapping[str, Tensor],
    ) -> None:
        self.recorder = recorder
        self._given = {name: tensor.clone() for name, tensor in like.items()}
        self._result = recorder.record(lambda: function(self._given))

    def __call__(
        self,
        given: Mapping[str, Tensor],
        behind: Callable[[], None] | None = None,
        ahead: Callable[[], None] | None = None,
    ) -> Tensor | None:
        """The function's result, which the next call overwrites.

        Args:
            given: tensors by name.
            behind: see :meth:`Recorder.replay`.
            ahead: likewise.

        Raises:
            ValueError: a tensor is missing or new, or of another shape, format or device than was recorded.
        """
        self._fill(given)
        self.recorder.replay(behind, ahead)
        return self._result

    @torch.no_grad()
    def _fill(self, given: Mapping[str, Tensor]) -> None:
        if given.keys() != self._given.keys():
            raise ValueError(f"recorded with {', '.join(self._given)}, but called with {', '.join(given)}")
        for name, place in self._given.items():
            now = given[name]
            if (now.shape, now.dtype, now.device) != (place.shape, place.dtype, place.device):
                raise ValueError(f"{name} was {_kind(place)} when it was recorded, and is {_kind(now)} now")
        if given:
            torch._foreach_copy_(list(self._given.values()), [given[name] for name in self._given])


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), str(tensor.device)
