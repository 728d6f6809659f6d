# SPDX-License-Identifier: Apache-2.0
"""What a step takes, seen operator by operator: memory by part, operations of matrix products, and collectives."""

from __future__ import annotations

import functools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from megatron_bert.planning.shapes import asked_device

#: What memory is for. ``buffers`` are those of collectives and of gathered parameters; ``temporaries`` what the
#: backward pass and the optimizer make and drop again.
Part = Literal["weights", "gradients", "optimizer", "activations", "logits", "buffers", "temporaries"]


class Collective(NamedTuple):
    """A kind of message of a rank.

    Attributes:
        kind: all-reduce, all-gather, reduce-scatter, broadcast, send or receive.
        group: which ranks it is among: the name of an axis, or ``tied``.
        dtype: of the numbers, such as ``bfloat16``.
        size: ranks of the group.
    """

    kind: str
    group: str
    dtype: str
    size: int


@dataclass
class Traffic:
    """Messages of one kind in a step: how many, and how many bytes of whole tensors, gathered or before scattering."""

    count: int = 0
    bytes: int = 0


@dataclass
class StepMeasurement:
    """What one step took on one rank.

    Attributes:
        peak: bytes by part at the moment at which they were most.
        resident: bytes by part between steps.
        building: bytes when they were most before the first step, while the trainer was built.
        flops: of matrix products and attention, a multiply and an add counted as two, recomputation included.
        traffic: messages by kind.
    """

    peak: dict[Part, int] = field(default_factory=dict)
    resident: dict[Part, int] = field(default_factory=dict)
    building: int = 0
    flops: int = 0
    traffic: dict[Collective, Traffic] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """At the moment at which they were most."""
        return sum(self.peak.values())


#: Operators that communicate, by their name: kind, and which argument is the whole tensor.
_COLLECTIVES: dict[str, tuple[str, Literal["input", "output"]]] = {
    "c10d::allreduce_": ("all-reduce", "input"),
    "c10d::_allgather_base_": ("all-gather", "output"),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", "input"),
    "c10d::broadcast_": ("broadcast", "input"),
    "c10d::send": ("send", "input"),
    "c10d::recv_": ("receive", "input"),
    "_c10d_functional::all_reduce": ("all-reduce", "input"),
    "_c10d_functional::all_reduce_": ("all-reduce", "input"),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", "output"),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", "input"),
}
#: Operators of processors that torch does not count -> those of GPUs that do the same.
_SAME_WORK = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}
_SILENT = {"c10d::barrier"}
#: Attention of packed rows -> operations for each pair of tokens and feature.
_ATTENTION = {torch.ops.aten._flash_attention_forward: 4.0, torch.ops.aten._flash_attention_backward: 10.0}


class _Kind(NamedTuple):
    """What there is to measure of an operator, whatever its arguments."""

    waits: bool
    sends: bool
    fills_buffers: bool
    multiplies: bool


@functools.cache
def _kind(func: Any) -> _Kind:
    name, packet = func._schema.name, func._overloadpacket
    communicates = name.startswith(("c10d::", "_c10d_functional::"))
    return _Kind(
        waits=name == "_c10d_functional::wait_tensor",
        sends=communicates and name not in _SILENT,
        fills_buffers=communicates or name.startswith("fsdp::"),
        multiplies=packet in _ATTENTION or _SAME_WORK.get(packet, packet) in flop_registry,
    )


class StepMeter(TorchDispatchMode):
    """Measures what runs while it is entered.

    Args:
        groups: name of each process group -> the axis it stands for.
    """

    def __init__(self, groups: Mapping[str, str]) -> None:
        super().__init__()
        self.groups, self.measured = groups, StepMeasurement()
        self.phase: Part = "temporaries"
        # Storages by numbers of their own: a new one may be where one of the peak was.
        self._numbers, self._number_at = count(), dict[int, int]()
        self._alive: dict[int, tuple[int, Part]] = {}
        self._total = self._peak_total = 0
        self._peak: dict[int, tuple[int, Part]] = {}
        self._aside = False

    # ---------------------------------------------------------------- what is there

    def hold(self, tensors: Iterable[Tensor], part: Part) -> None:
        """Say what tensors are for, those that were made before included."""
        for tensor in tensors:
            self._note(tensor, part, again=True)

    def begin_step(self) -> None:
        """The trainer is built: what is there and has no part yet is the optimizer's, and the step is measured."""
        self.measured.building = max(self._total, self._peak_total)
        self.measured.traffic.clear()
        self.measured.flops = 0
        self._peak_total, self._peak = 0, {}
        for key, (size, part) in list(self._alive.items()):
            if part not in ("weights", "gradients"):
                self._alive[key] = size, "optimizer"

    def gradients_are_done(self) -> None:
        """The backward passes are over: what they made and left is gradients."""
        for key, (size, part) in list(self._alive.items()):
            if part == "temporaries":
                self._alive[key] = size, "gradients"
                if key in self._peak:
                    self._peak[key] = self._peak[key][0], "gradients"

    def finish(self) -> StepMeasurement:
        """What was measured."""
        for store, target in ((self._peak, self.measured.peak), (self._alive, self.measured.resident)):
            sums: Counter[Part] = Counter()
            for size, part in store.values():
                sums[part] += size
            target.update({part: size for part, size in sums.items() if size})
        return self.measured

    def _note(self, tensor: Tensor, part: Part, *, again: bool = False) -> None:
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._number_at:
            if again:
                key = self._number_at[place]
                self._alive[key] = self._alive[key][0], part
            return
        key = self._number_at[place] = next(self._numbers)
        self._alive[key] = 0, part
        weakref.finalize(storage, self._died, place)
        self._resize(key, storage.nbytes(), part)

    def _resize(self, key: int, size: int, part: Part) -> None:
        if size < self._alive[key][0] and self._total > self._peak_total:
            self._take_peak()
        self._total += size - self._alive[key][0]
        self._alive[key] = size, part

    def _died(self, place: int) -> None:
        if self._total > self._peak_total:
            self._take_peak()
        size, _ = self._alive.pop(self._number_at.pop(place))
        self._total -= size

    def _take_peak(self) -> None:
        """Remember what is alive; called when something is about to go, so that it is rare."""
        self._peak_total, self._peak = self._total, dict(self._alive)

    # ---------------------------------------------------------------- what is done

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Measure while the block lasts."""
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            if storage._cdata in self._number_at:  # gathered parameters come and go so
                self._resize(self._number_at[storage._cdata], size, "buffers")
            return result

        # How the result of an operator is divided follows from shapes of whole tensors, which no rank makes.
        propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def propagate_aside(propagator: ShardingPropagator, *args: Any) -> Any:
            before, self._aside = self._aside, True
            try:
                return propagate(propagator, *args)
            finally:
                self._aside = before

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        try:
            with patch.object(ShardingPropagator, propagate.__name__, propagate_aside), self:
                yield
            if self._total > self._peak_total:
                self._take_peak()
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and count it."""
        device = asked_device(func, args)
        if device is not None:
            return device
        if DTensor in types:
            return NotImplemented  # it comes again, on what this rank holds
        kwargs = kwargs or {}
        if self._aside:
            return func(*args, **kwargs)
        kind = _kind(func)
        if kind.waits:
            return args[0]  # as it does, but for tensors without numbers, for which it makes another
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            self._note_result(out, kind)
        elif out is not None:
            for value in tree_iter(out):
                if isinstance(value, Tensor):
                    self._note_result(value, kind)
        if kind.multiplies:
            self._count_flops(func, args, kwargs, out)
        if kind.sends:
            self._count_message(func._schema.name, args, out)
        return out

    def _note_result(self, tensor: Tensor, kind: _Kind) -> None:
        if kind.fills_buffers:
            part: Part = "buffers"
        else:
            part = "temporaries" if torch._C._current_autograd_node() is not None else self.phase
        self._note(tensor, part)

    def _count_flops(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        packet = func._overloadpacket
        if packet in _ATTENTION:
            query = args[0] if packet is torch.ops.aten._flash_attention_forward else args[1]
            longest = args[5] if packet is torch.ops.aten._flash_attention_forward else args[8]
            tokens, heads, size = query.shape
            self.measured.flops += int(_ATTENTION[packet] * tokens * longest * heads * size)
            return
        self.measured.flops += flop_registry[_SAME_WORK.get(packet, packet)](*args, **kwargs, out_val=out)

    def _count_message(self, name: str, args: tuple[Any, ...], out: Any) -> None:
        kind, whole = _COLLECTIVES[name]
        functional = name.startswith("_c10d_functional")
        if functional:
            tensors = [out if whole == "output" else args[0]]
            group = dist.distributed_c10d._resolve_process_group(args[-1])
        else:
            # Outputs come first among the arguments of the older operators.
            place = 1 if kind == "reduce-scatter" else 0
            given = args[place]
            tensors = [given] if isinstance(given, Tensor) else [t for t in tree_iter(given) if isinstance(t, Tensor)]
            box = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
            group = dist.ProcessGroup.unbox(box)
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        what = Collective(kind, self.groups.get(group.group_name, "other"), dtype, group.size())
        entry = self.measured.traffic.setdefault(what, Traffic())
        entry.count += 1
        entry.bytes += sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors)


def on_enter(module: torch.nn.Module, action: Callable[[], None]) -> None:
    """Call something before each forward pass of a module."""
    module.register_forward_pre_hook(lambda *_: action())
