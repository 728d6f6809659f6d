# SPDX-License-Identifier: Apache-2.0
"""A recorder of operators on processors, which stands for a CUDA graph; and a watch over what waits for a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

#: Operators whose results a host waits for, or that depend on numbers: their shapes do, or Python asks for them.
WAITING = (
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::is_nonzero",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::repeat_interleave.Tensor",
    "aten::bincount",
    # A tensor made of Python's numbers is copied from memory that is not page-locked.
    "aten::lift_fresh",
)


class WaitedError(AssertionError):
    """An operator waits for the device."""


class NoWaiting(TorchDispatchMode):
    """Fails where a host would wait for a GPU."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code stays so."""
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        full = f"{name}.{function._schema.overload_name}"
        if name in WAITING or full in WAITING:
            raise WaitedError(f"{full} waits for the device")
        if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            indices = args[1]
            if any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices):
                raise WaitedError(f"{full} with a mask waits for the device")
        return function(*args, **(kwargs or {}))


class _Recording(NoWaiting):
    """Notes operators while they run, and what tensors held before they were changed."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if function._schema.is_mutable:
            for tensor in given:
                key = tensor.untyped_storage()._cdata
                if key not in self.made and key not in self.before:
                    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                    self.before[key] = whole, whole.clone()
        out = super().__torch_dispatch__(function, types, args, kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in given}
        fresh = [value for value in tree_iter(out) if isinstance(value, Tensor)]
        fresh = [value for value in fresh if value.untyped_storage()._cdata not in known]
        self.made |= {value.untyped_storage()._cdata for value in fresh}
        if not function.is_view:
            self.steps.append((function, args, kwargs, fresh))
        return out


class Pool:
    """Memory that tapes share; see :class:`parallel.captured.Recorders`."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []


class Tape:
    """Records operators, undoes what they did, and does them again with the same tensors, as a CUDA graph does.

    Python does not run again, so what depended on its values stays as it was; waiting for the device is an error.

    Args:
        pool: of its memory, in which a replay destroys what tapes that were recorded later hold.
    """

    def __init__(self, pool: Pool | None = None) -> None:
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.replays = 0
        #: Steps that the replay under way has yet to do.
        self.left = 0
        #: Numbers of steps that other work may begin before.
        self.marks: list[int] = []
        #: Numbers of steps that wait for other work.
        self.holds: list[int] = []
        self._recording: _Recording | None = None
        self._later = (pool or Pool()).tapes
        self._later.append(self)

    def record(self, work: Callable[[], Tensor | None]) -> Tensor | None:
        """Record a function without doing its work."""
        self._recording = _Recording()
        with self._recording:
            result = work()
        for whole, values in self._recording.before.values():
            whole.copy_(values)
        self.steps = self._recording.steps
        self._recording = None
        self.destroy()  # nothing is there before the first replay
        return result

    def mark(self) -> None:
        """While recording: other work may begin here."""
        assert self._recording is not None, "a function is being recorded"
        self.marks.append(len(self._recording.steps))

    def hold(self) -> None:
        """While recording: what comes now waits for other work."""
        assert self._recording is not None, "a function is being recorded"
        assert len(self._recording.steps) > max(self.holds, default=0), "there is work to do meanwhile"
        self.holds.append(len(self._recording.steps))

    def destroy(self) -> None:
        """Its memory holds something else."""
        for _, _, _, fresh in self.steps:
            for tensor in fresh:
                if tensor.is_floating_point():
                    tensor.data.fill_(torch.nan)  # whose version stays: backward passes are still to be recorded

    @torch.no_grad()
    def replay(self, behind: Callable[[], None] | None = None, ahead: Callable[[], None] | None = None) -> None:
        """Do the work once more, and call ``behind`` at each mark on the way, ``ahead`` at each hold."""
        self.replays += 1
        for tape in self._later[self._later.index(self) :]:
            tape.destroy()
        for number in range(len(self.steps) + 1):
            self.left = len(self.steps) - number
            if behind is not None:
                for _ in range(self.marks.count(number)):
                    behind()
            if ahead is not None and number in self.holds:
                ahead()
            if self.left:
                self._do(*self.steps[number])

    @staticmethod
    def _do(function: Any, args: Any, kwargs: Any, places: list[Tensor]) -> None:
        out = function(*args, **kwargs)
        results = [value for value in tree_iter(out) if isinstance(value, Tensor)]
        if function.namespace == "_c10d_functional":  # it is under way: what waits for it knows the first one
            results = [torch.ops._c10d_functional.wait_tensor(result) for result in results]
        if places:
            assert len(results) == len(places), function
        for place, result in zip(places, results, strict=False):
            place.data.copy_(result)


class Tapes:
    """Makes tapes, and remembers them."""

    def __init__(self) -> None:
        self.made: list[Tape] = []

    def pool(self) -> Pool:
        """Another pool of memory."""
        return Pool()

    def recorder(self, pool: Pool) -> Tape:
        """A tape whose work is done in a pool."""
        self.made.append(Tape(pool))
        return self.made[-1]
