# SPDX-License-Identifier: Apache-2.0
"""Where the time of a few steps goes: a trace for viewers, and tables by part of the model and by kind of work."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_bert.model.stage import EncoderStage, ModelStage
from megatron_bert.training.metrics import Report
from megatron_bert.training.run_state import RunState
from parallel.object_collectives import gather_objects
from parallel.whole_files import reason_of, write_json, write_text

#: Folder of a run directory.
FOLDER = "profile"
_PREFIX = "part: "
OTHER = "other"
#: Kinds of kernels and operators by words of their names; the first that fits counts.
_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("communication", ("nccl", "gloo", "c10d::", "all_reduce", "allgather", "reduce_scatter", "work::wait")),
    ("attention", ("flash", "fmha", "attention", "softmax")),
    (
        "matrix products",
        ("gemm", "cutlass", "cublas", "nvjet", "aten::mm", "aten::addmm", "aten::bmm", "xmma", "linear"),
    ),
    ("normalization", ("norm",)),
    ("optimizer", ("adam", "lamb", "multi_tensor", "foreach")),
    ("copies", ("memcpy", "memset", "copy", "aten::cat", "aten::index", "fill", "zero")),
)
ELEMENTWISE = "elementwise and other"


@dataclass
class Usage:
    """What a rank's device and host did in the profiled steps.

    Attributes:
        steps: how many.
        wall_seconds: of all of them.
        host, device: seconds by part: of the host's own work, and of the kernels that it queued.
        kinds: seconds by kind, of kernels, or of the host's operators where there is no GPU.
        busy_seconds: in which the device had something to do; None without a GPU.
        kernels: how many were queued.
        memory: bytes by part at the peak of the last step; see :mod:`megatron_bert.training.memory`.
        failure: why the trace could not be written; empty where it is.
    """

    rank: int
    steps: int
    wall_seconds: float
    host: dict[str, float] = field(default_factory=dict)
    device: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, float] = field(default_factory=dict)
    busy_seconds: float | None = None
    kernels: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    failure: str = ""

    @property
    def idle_share(self) -> float | None:
        """Share of the time in which the device had nothing to do; None without a GPU."""
        return None if self.busy_seconds is None else max(0.0, 1.0 - self.busy_seconds / self.wall_seconds)


class StepProfiler:
    """Profiles a range of steps with torch's profiler, on the first rank of each pipeline stage.

    Args:
        steps: their numbers, from 1; empty for none.
    """

    def __init__(self, trainer: RunState, steps: range) -> None:
        self.trainer, self.steps = trainer, steps
        coordinate = trainer.mesh.coordinate
        self.chosen = all(coordinate[axis] == 0 for axis in coordinate if axis != "pipeline")
        self._stack: ExitStack | None = None
        self._profile: Any = None
        self._began = 0.0

    def before(self, step: int) -> None:
        """A step begins."""
        if step not in self.steps or self._stack is not None:
            return
        self._stack = ExitStack()
        if self.chosen:
            on_gpu = self.trainer.world.device.type == "cuda"
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
            self._stack.enter_context(_parts_marked(self.trainer))
            self._profile = self._stack.enter_context(profile(activities=activities, acc_events=True))
        self._synchronize()
        self._began = time.perf_counter()

    def after(self, step: int, memory: dict[str, int], report: Report, *, last: bool = False) -> None:
        """A step has ended, or the run; every rank calls.

        Args:
            memory: bytes by part at its peak.
            last: whether no other step follows.
        """
        if self._stack is None or (step + 1 in self.steps and not last):
            return
        self._synchronize()
        seconds = time.perf_counter() - self._began
        self._stack.close()
        self._stack, done = None, range(self.steps.start, step + 1)
        self.steps = range(0)
        mine: Usage | None = None
        if self.chosen:
            mine = usage(self._profile.events(), dist.get_rank(), len(done), seconds)
            mine.failure, mine.memory = self._write_trace(done), dict(memory)
            self._profile = None
        found = [one for one in gather_objects(mine) if one is not None]
        report.attempt(FOLDER, "there is no table of the profile", lambda: self._write_tables(found, done))
        report.say(f"profile of steps {done.start} to {done[-1]}: {_in_short(found)}; see {self._folder}")

    @property
    def _folder(self) -> Any:
        return self.trainer.settings.training.run_dir / FOLDER

    def _synchronize(self) -> None:
        if self.trainer.world.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.world.device)

    def _write_trace(self, done: range) -> str:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"steps_{done.start}_to_{done[-1]}_rank_{dist.get_rank():05d}.json.gz"
            self._profile.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            return reason_of(error) if isinstance(error, OSError) else str(error)
        return ""

    def _write_tables(self, found: list[Usage], done: range) -> None:
        name = f"steps_{done.start}_to_{done[-1]}"
        write_text(self._folder / f"{name}.txt", "\n".join(map(as_table, found)))
        ranks = [vars(one) | {"idle_share": one.idle_share} for one in found]
        write_json(self._folder / f"{name}.json", {"ranks": ranks})


# ---------------------------------------------------------------- parts


@contextmanager
def _parts_marked(trainer: RunState) -> Iterator[None]:
    """Mark what modules and the steps around them do for the profiler."""
    with ExitStack() as stack:
        for stage in trainer.model.stages.values():
            for name, module in _named_parts(stage, compiled=bool(trainer.settings.training.compile)):
                stack.enter_context(_marked_module(module, name))
        for owner, method, name in (
            (trainer.objective, "loss_sums", "loss"),
            (trainer.optimizer, "step", "optimizer"),
            (trainer, "_finish_gradients", "gradients: sums and norm"),
        ):
            stack.enter_context(_marked_method(owner, method, name))
        yield


def _named_parts(stage: ModelStage, *, compiled: bool) -> Iterator[tuple[str, nn.Module]]:
    for name, child in stage.named_children():
        if name != "encoder":
            yield ("embeddings" if name == "embeddings" else f"head: {name}"), child
    assert isinstance(stage, EncoderStage), "what is trained has layers"
    for layer in stage.encoder.layer_list():
        yield ("layers" if compiled else "layers: the rest"), layer
        if not compiled:  # hooks inside of what is compiled would break its graph
            yield "layers: attention", layer.attention
            yield "layers: MLP", layer.mlp


@contextmanager
def _marked_module(module: nn.Module, name: str) -> Iterator[None]:
    open_marks: list[Any] = []

    def begin(*_: Any) -> None:
        open_marks.append(record_function(_PREFIX + name))
        open_marks[-1].__enter__()

    def end(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    hooks = module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _marked_method(owner: Any, method: str, name: str) -> Iterator[None]:
    original: Callable[..., Any] = getattr(owner, method)

    @functools.wraps(original)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(_PREFIX + name):
            return original(*args, **kwargs)

    setattr(owner, method, marked)
    try:
        yield
    finally:
        delattr(owner, method)  # the class's own is behind it


# ---------------------------------------------------------------- tables


def usage(events: Iterable[Any], rank: int, steps: int, wall_seconds: float) -> Usage:
    """What the events of torch's profiler add up to.

    A backward operator counts for the part whose forward operator it belongs to, by autograd's sequence number.

    Args:
        events: of type ``torch.autograd.profiler_util.FunctionEvent``.
        steps: how many were profiled.
        wall_seconds: of all of them.
    """
    host, device, kinds = (defaultdict[str, float](float) for _ in range(3))
    found = Usage(rank, steps, wall_seconds)
    events = list(events)
    forward: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and not _is_backward(event):
            part = _part(event)
            if part is not None:
                forward.setdefault(event.sequence_nr, part)
    intervals = []
    for event in events:
        if event.device_type != DeviceType.CPU:
            intervals.append((event.time_range.start, event.time_range.end))
            continue
        part = _part(event, forward) or OTHER
        host[part] += event.self_cpu_time_total / 1e6
        for kernel in event.kernels:
            device[part] += kernel.duration / 1e6
            kinds[_kind(kernel.name)] += kernel.duration / 1e6
            found.kernels += 1
    if intervals:
        found.busy_seconds = _covered(intervals) / 1e6
    else:
        for event in events:
            if not event.name.startswith(_PREFIX):
                kinds[_kind(event.name)] += event.self_cpu_time_total / 1e6
    found.host, found.device, found.kinds = dict(host), dict(device), dict(kinds)
    return found


def _is_backward(event: Any) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")


def _with_parents(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _part(event: Any, forward: dict[int, str] | None = None) -> str | None:
    """What is marked around an event; the part of the forward pass that it is the backward pass of, where known."""
    for above in _with_parents(event):
        if forward is not None and _is_backward(above) and above.sequence_nr in forward:
            return f"{forward[above.sequence_nr]}, backward"
        if above.name.startswith(_PREFIX):
            return str(above.name.removeprefix(_PREFIX))
    return None


def _kind(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, words in _KINDS if any(word in lower for word in words)), ELEMENTWISE)


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _in_short(found: list[Usage]) -> str:
    said = []
    for one in found:
        idle = one.idle_share
        share = "" if idle is None else f", its device idle {idle:.0%} of it"
        refused = f", its trace could not be written ({one.failure})" if one.failure else ""
        said.append(f"rank {one.rank} took {one.wall_seconds / one.steps * 1000:.1f} ms per step{share}{refused}")
    return "; ".join(said)


def as_table(one: Usage) -> str:
    """The tables of a rank, in milliseconds per step."""

    def milliseconds(seconds: float) -> str:
        return f"{seconds / one.steps * 1000:10.2f}"

    lines = [f"rank {one.rank}: {one.steps} steps, {one.wall_seconds / one.steps * 1000:.2f} ms per step"]
    if one.idle_share is not None:
        lines.append(f"device idle {one.idle_share:.1%}; {one.kernels / one.steps:.0f} kernels per step")
    lines += ["", f"{'part':40s}{'host ms':>10s}{'device ms':>11s}"]
    for part in sorted(one.host, key=lambda part: -max(one.device.get(part, 0.0), one.host[part])):
        lines.append(f"{part:40s}{milliseconds(one.host[part])} {milliseconds(one.device.get(part, 0.0))}")
    of = "device" if one.device else "host"
    lines += ["", f"{'kind':40s}{of + ' ms':>10s}"]
    lines += [f"{kind:40s}{milliseconds(one.kinds[kind])}" for kind in sorted(one.kinds, key=lambda k: -one.kinds[k])]
    if one.memory:
        lines += ["", f"{'memory':40s}{'MiB':>10s}"]
        lines += [f"{part:40s}{size / 2**20:10.1f}" for part, size in one.memory.items()]
    return "\n".join(lines) + "\n"
