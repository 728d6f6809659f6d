# SPDX-License-Identifier: Apache-2.0
"""Work of a GPU that is recorded once as a CUDA graph and replayed with other values.

A replay costs the host one launch in place of thousands. What is recorded is the work alone: memory addresses, sizes
and numbers that Python knew are those of the recording, so inputs are copied to the same places, and must have the
same shapes; results and gradients come to be where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class Recorder(Protocol):
    """Records what a function queues on a device."""

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """Record a function without doing its work; its result, which :meth:`replay` fills."""

    def replay(self) -> None:
        """Do the work once more."""


class CudaRecorder:
    """A CUDA graph, recorded on the current stream, which must not be the default one.

    Dropout of fused attention draws from torch's generator: every replay goes on from where that is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.graph = device, torch.cuda.CUDAGraph()
        index = torch.cuda.current_device() if device.index is None else device.index
        self.graph.register_generator_state(torch.cuda.default_generators[index])

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """Record a function without doing its work; its result, which :meth:`replay` fills."""
        # Other threads may pin memory and ask for events meanwhile.
        stream = torch.cuda.current_stream(self.device)
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        """Do the work once more."""
        self.graph.replay()


def on_own_stream(device: torch.device) -> None:
    """Let this thread queue its work on a stream that can be recorded: the default one cannot.

    To be called before parameters are made: their gradients are added on the stream that they were first used on.
    """
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        torch.cuda.set_stream(stream)


class Captured:
    """A function of tensors whose work is recorded at one of its calls, and replayed at that and all that follow.

    It may change tensors beside its arguments, such as gradients that it adds to, if they stay where they are. It may
    neither wait for the device nor depend on anything else that changes between calls.

    Args:
        function: takes tensors by name, and returns one.
        recorder: makes one; called once.
        warmups: calls that run the function as it is, before the one that is recorded: libraries and compilers set
            themselves up in the first ones.
    """

    def __init__(
        self, function: Callable[[Mapping[str, Tensor]], Tensor], recorder: Callable[[], Recorder], warmups: int = 3
    ) -> None:
        self.function, self.make_recorder, self.warmups = function, recorder, warmups
        self.recorder: Recorder | None = None
        self._given: dict[str, Tensor] = {}
        self._result: Tensor | None = None

    def __call__(self, given: Mapping[str, Tensor]) -> Tensor:
        """The function's result, which the next call overwrites.

        Raises:
            ValueError: a tensor is missing or new, or of another shape, format or device than was recorded.
        """
        if self.warmups:
            self.warmups -= 1
            return self.function(given)
        if self.recorder is None:
            self._given = {name: tensor.clone() for name, tensor in given.items()}
            recorder = self.make_recorder()
            self._result = recorder.record(lambda: self.function(self._given))
            self.recorder = recorder
        else:
            self._fill(given)
        self.recorder.replay()
        assert self._result is not None, "it has been recorded"
        return self._result

    @torch.no_grad()
    def _fill(self, given: Mapping[str, Tensor]) -> None:
        if given.keys() != self._given.keys():
            raise ValueError(f"recorded with {', '.join(self._given)}, but called with {', '.join(given)}")
        for name, place in self._given.items():
            if _kind(given[name]) != _kind(place):
                raise ValueError(f"{name} was {_kind(place)} when it was recorded, and is {_kind(given[name])} now")
        torch._foreach_copy_(list(self._given.values()), [given[name] for name in self._given])


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), str(tensor.device)
