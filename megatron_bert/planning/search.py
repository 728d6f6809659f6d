# SPDX-License-Identifier: Apache-2.0
"""Layouts compared: what each takes, whether it fits, and which is fastest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice

from megatron_bert.planning.communication import Message, data_messages, step_messages
from megatron_bert.planning.devices import GIB
from megatron_bert.planning.fullest import distinct_ranks, fullest
from megatron_bert.planning.layouts import Layout, Stage, layouts, stages_of, why_not
from megatron_bert.planning.machine import Machine
from megatron_bert.planning.memory import RankMemory
from megatron_bert.planning.step_time import StepTime, step_time
from megatron_bert.planning.workload import Workload

#: Of a device's memory: what a rank may fill, beside CUDA's context, buffers of NCCL and what fragmentation wastes.
USABLE_SHARE, CONTEXT_GIB = 0.95, 1.5
#: Layouts at least whose schedule is simulated; those below are ranked by closed forms alone, and are not shown.
SIMULATED = 40
_TOO_MUCH = "more memory than a rank has"


@dataclass(frozen=True)
class Prediction:
    """What a run takes in a layout.

    Attributes:
        fullest: the rank of a pipeline that takes most memory.
        memory: of that rank.
        time: of a step.
        messages: of the first pipeline rank in a step.
        stage_layers: layers of each stage where the settings say them; None for balanced ones.
    """

    workload: Workload
    layout: Layout
    machine: Machine
    fullest: int
    memory: RankMemory
    time: StepTime
    messages: list[Message]
    stage_layers: list[int] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.workload.global_batch * self.workload.sample_tokens / self.time.seconds

    @property
    def mfu(self) -> float:
        """Operations of the model over what the dense peaks of all devices would do in the same time."""
        peak = self.machine.device.peak_tflops[self.workload.compute] * 1e12
        return self.workload.step_flops / (self.time.seconds * self.layout.world_size * peak)

    @property
    def hours(self) -> float | None:
        """Of all steps; None where nobody knows how many."""
        return None if self.workload.steps is None else self.time.seconds * self.workload.steps / 3600

    @property
    def days(self) -> float | None:
        """The same in days."""
        return None if self.hours is None else self.hours / 24

    @property
    def device_hours(self) -> float | None:
        """Of all steps on all ranks."""
        return None if self.hours is None else self.hours * self.layout.world_size


def usable_bytes(machine: Machine) -> float:
    """Memory that a rank may fill."""
    memory = machine.device.memory_gib
    return memory * GIB if not machine.device.asynchronous else max(0.0, memory * USABLE_SHARE - CONTEXT_GIB) * GIB


def predict(workload: Workload, layout: Layout, machine: Machine, stage_layers: list[int] | None = None) -> Prediction:
    """What a layout takes, which can be.

    Raises:
        UserError: stages that do not fit.
    """
    stages = stages_of(workload, layout, stage_layers)
    messages = [step_messages(workload, layout, stages, rank) for rank in distinct_ranks(layout, stages)]
    time = step_time(workload, layout, stages, messages, machine)
    rank, memory = fullest(workload, layout, stages)
    return Prediction(workload, layout, machine, rank, memory, time, messages[0], stage_layers)


@dataclass(frozen=True)
class Search:
    """Layouts of a workload on a number of ranks.

    Attributes:
        ranked: the fastest that fit, the fastest first.
        tried: how many layouts there are.
        out: why others are out, and how many for each reason; all others if they were counted, or if none fits.
        nearest: of those that do not fit, the one that needs least memory.
    """

    ranked: list[Prediction]
    tried: int
    out: Counter[str]
    nearest: tuple[Layout, float] | None


def search(
    workload: Workload,
    ranks: int,
    machine: Machine,
    configured: Prediction | None = None,
    *,
    most: int = SIMULATED,
    counted: bool = True,
) -> Search:
    """Rank every layout.

    Args:
        configured: of the layout that the settings have, ranked among the others even if no search would try it.
        most: how many are ranked; of those that fit, the fastest by closed forms alone.
        counted: find out of all layouts whether they fit, not only until so many do.
    """
    limit, out, tried = usable_bytes(machine), Counter[str](), 0
    nearest: tuple[Layout, float] | None = None

    def fits(layout: Layout, needed: float) -> bool:
        nonlocal nearest
        if needed <= limit:
            return True
        out[_TOO_MUCH] += 1
        if nearest is None or needed < nearest[1]:
            nearest = layout, needed
        return False

    def one_fits(layout: Layout, stages: list[Stage]) -> bool:
        return fits(layout, fullest(workload, layout, stages)[1].needed)

    possible: list[tuple[float, Layout, list[Stage]]] = []
    stages_by: dict[tuple[object, ...], list[Stage]] = {}
    micro_batch = 1 if configured is None else configured.layout.micro_batch
    for layout in layouts(workload, ranks, micro_batch):
        if configured is not None and layout == configured.layout:
            continue
        tried += 1
        reason = why_not(workload, layout)
        if reason is not None:
            out[reason] += 1
            continue
        stages = _stages_of(workload, layout, stages_by)
        if not counted or one_fits(layout, stages):
            possible.append((_rough_seconds(workload, layout, stages, machine), layout, stages))
    possible.sort(key=lambda entry: entry[0])
    fastest = (layout for _, layout, stages in possible if counted or one_fits(layout, stages))
    ranked = [predict(workload, layout, machine) for layout in islice(fastest, most)]
    if configured is not None:
        tried += 1
        if fits(configured.layout, configured.memory.needed):
            ranked.insert(0, configured)
    ranked.sort(key=lambda prediction: prediction.time.seconds)
    return Search(ranked, tried, out, nearest)


def _rough_seconds(workload: Workload, layout: Layout, stages: list[Stage], machine: Machine) -> float:
    count = layout.microbatches(workload)
    messages = [
        [m for number in layout.stages_of(rank) for m in data_messages(workload, layout, stages[number], count)]
        for rank in distinct_ranks(layout, stages)
    ]
    return step_time(workload, layout, stages, messages, machine, simulated=False).seconds


def _stages_of(workload: Workload, layout: Layout, known: dict[tuple[object, ...], list[Stage]]) -> list[Stage]:
    """The stages of a layout, made once for those that divide the model alike."""
    key = (layout.tensor, layout.pipeline, layout.chunks, layout.flat, layout.shards)
    if key not in known:
        known[key] = stages_of(workload, layout)
    return known[key]
