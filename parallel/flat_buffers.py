# SPDX-License-Identifier: Apache-2.0
"""Data parallelism on flat buffers: weights that every rank holds whole, states that each holds a share of.

The parameters of a stage are views of one buffer in the format of the computation, and their gradients add up in
another one in float32, straight from the backward pass of every micro batch. Both are cut into buckets. While the last
backward pass of a step goes on, complete buckets are summed over the data ranks: each rank gets its range of every
bucket (reduce-scatter), or everything where nothing is divided (all-reduce). Each rank updates the float32 master
weights of its ranges and gives the others what they compute with (all-gather), behind the next forward pass. This is
Megatron-LM's distributed optimizer, or ZeRO stage 1 (Rajbhandari et al., arXiv 1910.02054).

A range knows nothing of parameters, but any range of a matrix is at most three rectangles, by which checkpoints name
it. Bytes per parameter: 6 for weights and gradients and 12 / d for master weights and two moments on d ranks in
bfloat16; 8 + 8 / d in float32, whose weights are the master weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.buckets import Bucket, Slot
from parallel.gradients import set_own_gradient
from parallel.huge_pages import large_zeros
from parallel.mesh import ParallelMesh
from parallel.parts import PLANE, Part
from parallel.runs import Member, Run
from parallel.sharding import local_tensor
from parallel.torch_types import is_dtensor
from parallel.weight_gradients import add_in_place

#: Parameters begin, and buckets are divided, at multiples of so many elements: 128 bytes in two-byte formats, which
#: every kernel's loads and every collective are content with.
ALIGNMENT = 64


class FlatBuffers:
    """The parameters of a stage, their gradients and master weights.

    The parameters of the model are replaced: by plain ones, this tensor rank's part of each, in the format of the
    computation, with a float32 gradient that is never None. Gradients are allocated last, when those that were replaced
    are gone, so that building takes no more memory than training.

    Args:
        model: the whole model, or the part of it on this pipeline stage.
        groups: modules inside of it whose parameters are communicated together, in the order they run; the rest of the
            model comes before them.
        compute_dtype: float32, bfloat16 or float16.
        alone: parameters that get a bucket each, so that another stage with a copy divides it in the same way.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[nn.Module]],
        mesh: ParallelMesh,
        compute_dtype: torch.dtype,
        alone: Iterable[nn.Parameter] = (),
    ) -> None:
        self.mesh = mesh
        #: Over which gradients are summed; one of the axes, since they are either divided or copied.
        self.axis = "data_shard" if mesh.layout.data_shard > 1 else "data_replicate"
        self.ranks = mesh.layout.data
        assert mesh.layout.data_shard in (1, self.ranks), "flat buffers are divided over all data ranks or none"
        self.divided = mesh.layout.data_shard > 1
        self._last = self._summed = False
        self._next_to_reduce = 0
        self._mark: Callable[[], None] | None = None
        self._hold: Callable[[], None] | None = None
        #: Buckets of each group but the first, which a replayed forward pass waits for on its way.
        self._on_the_way: list[list[Bucket]] = []
        self._allocate(model, self._bucket_parameters(model, groups, alone), compute_dtype)
        if compute_dtype != torch.float32:
            # torch.compile does not take parameters whose gradients have another format, wherever they are used.
            model.register_forward_pre_hook(lambda *_: self._show_gradients(False))
            model.register_forward_hook(lambda *_: self._show_gradients(True), always_call=True)
        if self.ranks > 1:
            self._watch(model, groups)

    # ---------------------------------------------------------------- layout

    @staticmethod
    def _bucket_parameters(
        model: nn.Module, groups: Sequence[Sequence[nn.Module]], alone: Iterable[nn.Parameter]
    ) -> list[list[nn.Parameter]]:
        """The parameters of each bucket: those alone, those of the root, and those of each group."""
        rest: dict[nn.Parameter, None] = dict.fromkeys(model.parameters())

        def taken(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
            """Those that are in no bucket yet."""
            return [parameter for parameter in parameters if rest.pop(parameter, parameter) is None]

        first = [taken([parameter]) for parameter in alone]
        inside = [taken(parameter for unit in group for parameter in unit.parameters()) for group in groups]
        return [bucket for bucket in [*first, list(rest), *inside] if bucket]

    def _allocate(self, model: nn.Module, buckets: list[list[nn.Parameter]], compute_dtype: torch.dtype) -> None:
        end, device = 0, self.mesh.device
        places: list[list[tuple[nn.Parameter, int]]] = []
        bounds = [0]
        for bucket in buckets:
            places.append([])
            # Of one kind together: the optimizer takes neighbors of one kind as one tensor.
            for parameter in sorted(bucket, key=lambda p: (not is_dtensor(p), p.dim() < 2)):
                places[-1].append((parameter, end))
                end += _up(local_tensor(parameter).numel(), ALIGNMENT)
            end = bounds[-1] + _up(end - bounds[-1], ALIGNMENT * (self.ranks if self.divided else 1))
            bounds.append(end)
        self.weights = large_zeros(end, dtype=compute_dtype, device=device)
        share = end // self.ranks if self.divided else end
        #: Float32 weights of this rank's ranges, one after the other; none where those computed with are float32.
        self.masters = large_zeros(share if compute_dtype != torch.float32 else 0, device=device)
        self.buckets = [self._bucket(*between) for between in pairwise(bounds)]
        self._take(model, places)
        # Nobody holds the parameters that were the model's from here on: they make room for the gradients.
        del buckets, bucket, places, parameter
        self.gradients = large_zeros(end, device=device)
        for filled in self.buckets:
            for slot in filled.slots:
                self._give_gradient(filled, slot)

    def _bucket(self, start: int, stop: int) -> Bucket:
        own, first = slice(start, stop), start
        if self.divided:
            share = (stop - start) // self.ranks
            own = slice(start + self.mesh.data_rank * share, start + (self.mesh.data_rank + 1) * share)
            first = start // self.ranks
        master = self.masters[first : first + own.stop - own.start] if self.masters.numel() else self.weights[own]
        return Bucket([], start, stop - start, own, master)

    @torch.no_grad()
    def _take(self, model: nn.Module, places: list[list[tuple[nn.Parameter, int]]]) -> None:
        """Copy the values of parameters to their places in the buckets, and give the model those instead."""
        fresh: dict[nn.Parameter, nn.Parameter] = {}
        for bucket, inside in zip(self.buckets, places, strict=True):
            for parameter, start in inside:
                part = Part.of(parameter)
                local, ((offsets, _),) = part.values, part.regions
                view = slice(start, start + local.numel())
                self.weights[view].copy_(local.reshape(-1))
                fresh[parameter] = nn.Parameter(self.weights[view].view(local.shape), parameter.requires_grad)
                slot = Slot(fresh[parameter], part.shape, offsets, is_dtensor(parameter), start)
                bucket.slots.append(slot)
                if self.masters.numel():
                    low, high = bucket.own_part(slot)
                    values = local.reshape(-1)[low - start : high - start]
                    bucket.master[low - bucket.own.start : high - bucket.own.start].copy_(values)
        _replace(model, fresh)

    def _give_gradient(self, bucket: Bucket, slot: Slot) -> None:
        parameter = slot.parameter
        # Gradients come in the format of the computation and add up in float32, in the kernel that adds them.
        parameter.grad_dtype = None
        slot.gradient = self.gradients[slot.start : slot.stop].view(parameter.shape)
        parameter.grad = slot.gradient
        low, high = bucket.own_part(slot)
        set_own_gradient(parameter, self.gradients[low:high])
        if self.ranks == 1 and parameter.requires_grad:
            add_in_place(parameter)

    def runs(self, kind: Callable[[nn.Parameter], Hashable]) -> list[Run]:
        """What this rank updates, neighbors of one kind together.

        Returns:
            Runs in which every parameter of the stage occurs once: in one without values if this rank has none of it.
        """
        runs: list[Run] = []
        absent: dict[tuple[Hashable, bool], dict[nn.Parameter, Member]] = {}
        for bucket in self.buckets:
            together: list[tuple[Slot, int, int]] = []
            for slot in bucket.slots:
                low, high = bucket.own_part(slot)
                if low == high:
                    empty = Member(slot.shape, 0, 0, ())
                    absent.setdefault((kind(slot.parameter), slot.divided), {})[slot.parameter] = empty
                    continue
                if together and _differs(together[-1][0], slot, kind):
                    runs.append(self._run(bucket, together, kind))
                    together = []
                together.append((slot, low, high))
            if together:
                runs.append(self._run(bucket, together, kind))
        nothing = self.gradients[:0]
        runs += [Run(nothing, found, key[0], self._axes(key[1]), nothing) for key, found in absent.items()]
        return runs

    def _run(
        self, bucket: Bucket, together: list[tuple[Slot, int, int]], kind: Callable[[nn.Parameter], Hashable]
    ) -> Run:
        first, last = together[0][1], together[-1][2]
        members = {
            slot.parameter: Member(
                slot.shape, low - first, high - low, slot.regions(low - slot.start, high - slot.start)
            )
            for slot, low, high in together
        }
        slot = together[0][0]
        values = bucket.master[first - bucket.own.start : last - bucket.own.start]
        return Run(values, members, kind(slot.parameter), self._axes(slot.divided), self.gradients[first:last])

    def _axes(self, divided: bool) -> frozenset[str]:
        """Over which values of this rank are copied."""
        shared = {"data_shard"} if self.divided else set()
        return PLANE - shared - ({"tensor"} if divided else set())

    def _show_gradients(self, shown: bool) -> None:
        for bucket in self.buckets:
            for slot in bucket.slots:
                slot.parameter.grad = slot.gradient if shown else None

    # ---------------------------------------------------------------- a step

    def begin_backward(self, last: bool) -> None:
        """Say whether the coming backward pass is the last of the step, after which gradients are summed."""
        self._summed = False
        self._last = last and self.ranks > 1
        if self._last:
            self._expect()

    def _expect(self) -> None:
        self._next_to_reduce = len(self.buckets) - 1
        for bucket in self.buckets:
            bucket.missing = len(bucket.slots)

    @contextmanager
    def marking(self, mark: Callable[[], None]) -> Iterator[None]:
        """A backward pass is being recorded, whose replays call no hooks.

        Args:
            mark: called where the gradients of the next bucket are complete, for :meth:`reduce_next` to be called there
                in a replay.
        """
        self._mark = mark
        self._expect()
        try:
            yield
        finally:
            self._mark = None

    @contextmanager
    def holding(self, hold: Callable[[], None]) -> Iterator[None]:
        """A forward pass is being recorded, whose replays call no hooks, and no weights are on their way.

        Args:
            hold: called where the next group needs its weights, for the next step of :meth:`arrivals` to be made there
                in a replay.
        """
        self._hold = hold
        try:
            yield
        finally:
            self._hold = None

    def arrivals(self) -> Iterator[None]:
        """Waits in turn, at every step, for the weights of a group that a recorded forward pass holds for."""
        for buckets in self._on_the_way:
            self.wait(buckets)
            yield

    def wait_before_replay(self) -> None:
        """Wait for the weights that a recorded forward pass needs before it holds for the first time."""
        self.wait(bucket for bucket in self.buckets if not any(bucket in later for later in self._on_the_way))

    def _arrived(self, bucket: Bucket) -> None:
        if not self._last and self._mark is None:
            return
        bucket.missing -= 1
        # In one order on all ranks, whatever the order in which gradients arrive.
        while self._next_to_reduce >= 0 and self.buckets[self._next_to_reduce].missing == 0:
            if self._mark is None:
                self._reduce(self.buckets[self._next_to_reduce])
            else:
                self._mark()
                self._next_to_reduce -= 1

    def reduce_next(self) -> None:
        """Begin to sum the next bucket, whose gradients are complete, if this is the last backward pass of the step."""
        if self._last:
            self._reduce(self.buckets[self._next_to_reduce])

    def _reduce(self, bucket: Bucket) -> None:
        self._next_to_reduce -= 1
        whole = self.gradients[bucket.start : bucket.start + bucket.size]
        group = self.mesh.device_mesh.get_group(self.axis)
        if self.divided:
            bucket.reducing = reduce_scatter(self.gradients[bucket.own], whole, group=group, async_op=True)
        else:
            bucket.reducing = dist.all_reduce(whole, group=group, async_op=True)

    def reduce(self) -> None:
        """Begin to sum all gradients that are complete now, and whose sum has not begun in the last backward pass."""
        if self.ranks == 1 or self._summed:
            return
        if not self._last:
            self.begin_backward(last=True)
        while self._next_to_reduce >= 0:
            self._reduce(self.buckets[self._next_to_reduce])

    def finish(self) -> None:
        """Wait for the sums over data ranks: gradients of this rank's ranges are complete then.

        On a GPU the current stream waits, not the host.
        """
        self.wait()  # as every forward pass has done, unless it left a module out
        self.reduce()
        self._last, self._summed = False, True
        for bucket in self.buckets:
            if bucket.reducing is not None:
                bucket.reducing.wait()
                bucket.reducing = None

    @torch.no_grad()
    def publish(self) -> None:
        """Compute with the master weights from now on; every data rank calls, after they have changed."""
        self.wait()
        if self.masters.numel():
            torch._foreach_copy_(
                [self.weights[bucket.own] for bucket in self.buckets], [bucket.master for bucket in self.buckets]
            )
        if not self.divided:
            return
        group = self.mesh.device_mesh.get_group(self.axis)
        # Gloo copies what arrives in a thread of its own, when layers before may have saved their weights already: with
        # a version counter of its own, that is not a change of theirs to autograd.
        weights = self.weights.data
        for bucket in self.buckets:
            whole = weights[bucket.start : bucket.start + bucket.size]
            bucket.gathering = all_gather(whole, weights[bucket.own], group=group, async_op=True)

    def wait(self, buckets: Iterable[Bucket] | None = None) -> None:
        """Wait for weights of other ranks, before the computation uses them."""
        for bucket in self.buckets if buckets is None else buckets:
            if bucket.gathering is not None:
                bucket.gathering.wait()
                bucket.gathering = None

    def zero(self) -> None:
        """Forget the gradients."""
        self.gradients.zero_()
        self._summed = False

    def _watch(self, model: nn.Module, groups: Sequence[Sequence[nn.Module]]) -> None:
        """Notice gradients as they arrive, and wait for weights as they are needed."""
        by_parameter = {slot.parameter: bucket for bucket in self.buckets for slot in bucket.slots}
        for parameter, bucket in by_parameter.items():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._arrived(bucket))
        if not self.divided:
            return
        outside = set(model.modules())
        for number, group in enumerate(groups):
            modules = {module for unit in group for module in unit.modules()}
            outside -= modules
            needed = self._buckets_of(modules, by_parameter)
            for unit in group:
                unit.register_forward_pre_hook(lambda *_, needed=needed: self.wait(needed))
            if number:
                self._on_the_way.append(needed)
                group[0].register_forward_pre_hook(lambda *_: None if self._hold is None else self._hold())
        around = self._buckets_of(outside, by_parameter)
        # Without gradients, modules may be called in other ways and orders than in training.
        model.register_forward_pre_hook(lambda *_: self.wait(around if torch.is_grad_enabled() else None))

    def _buckets_of(self, modules: set[nn.Module], by_parameter: dict[nn.Parameter, Bucket]) -> list[Bucket]:
        """The buckets with parameters that the modules themselves hold."""
        needed = {by_parameter[p] for module in modules for p in module.parameters(recurse=False)}
        return [bucket for bucket in self.buckets if bucket in needed]


def _differs(one: Slot, other: Slot, kind: Callable[[nn.Parameter], Hashable]) -> bool:
    return one.divided != other.divided or kind(one.parameter) != kind(other.parameter)


def _replace(model: nn.Module, replacements: dict[nn.Parameter, nn.Parameter]) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, replacements[parameter])


def _up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


#: Torch 2.13 has other names for these, and warns of the old ones.
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
