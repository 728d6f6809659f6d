# SPDX-License-Identifier: Apache-2.0
"""Layouts compared: what each takes, whether it fits, and which is fastest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_bert.planning.communication import Message, data_messages, step_messages
from megatron_bert.planning.devices import GIB
from megatron_bert.planning.layouts import Layout, Stage, layouts, stages_of, why_not
from megatron_bert.planning.machine import Machine
from megatron_bert.planning.memory import RankMemory, rank_memory
from megatron_bert.planning.step_time import StepTime, step_time
from megatron_bert.planning.workload import Workload
from parallel.pipeline.schedules import SCHEDULES

#: Of a device's memory: what a rank may fill, beside CUDA's context, buffers of NCCL and what fragmentation wastes.
USABLE_SHARE, CONTEXT_GIB = 0.95, 1.5
#: Layouts whose schedule is simulated; those below are ranked by closed forms alone, and are not shown.
_SIMULATED = 40
_TOO_MUCH = "more memory than a rank has"


@dataclass(frozen=True)
class Prediction:
    """What a run takes in a layout.

    Attributes:
        memory: of the fullest rank.
        time: of a step.
        messages: of the first pipeline rank in a step.
        stage_layers: layers of each stage where the settings say them; None for balanced ones.
    """

    workload: Workload
    layout: Layout
    machine: Machine
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
    def hours(self) -> float:
        """Of all steps."""
        return self.time.seconds * self.workload.steps / 3600

    @property
    def device_hours(self) -> float:
        """Of all steps on all ranks."""
        return self.hours * self.layout.world_size


def usable_bytes(machine: Machine) -> float:
    """Memory that a rank may fill."""
    memory = machine.device.memory_gib
    return memory * GIB if not machine.device.asynchronous else max(0.0, memory * USABLE_SHARE - CONTEXT_GIB) * GIB


def fullest(workload: Workload, layout: Layout, stages: list[Stage]) -> RankMemory:
    """Memory of the rank that takes most: the first of a pipeline, or the one with the heads."""
    placement = SCHEDULES[layout.schedule].placement
    ranks = {0, placement.rank(layout.pipeline * layout.chunks - 1, layout.pipeline)}
    return max((rank_memory(workload, layout, stages, rank) for rank in ranks), key=lambda memory: memory.needed)


def predict(workload: Workload, layout: Layout, machine: Machine, stage_layers: list[int] | None = None) -> Prediction:
    """What a layout takes, which can be.

    Raises:
        UserError: stages that do not fit.
    """
    stages = stages_of(workload, layout, stage_layers)
    messages = step_messages(workload, layout, stages)
    time = step_time(workload, layout, stages, messages, machine)
    return Prediction(workload, layout, machine, fullest(workload, layout, stages), time, messages, stage_layers)


@dataclass(frozen=True)
class Search:
    """Layouts of a workload on a number of ranks.

    Attributes:
        ranked: those that fit, the fastest first.
        tried: how many layouts there are.
        out: why the others are out, and how many for each reason.
        nearest: of those that do not fit, the one that needs least memory.
    """

    ranked: list[Prediction]
    tried: int
    out: Counter[str]
    nearest: tuple[Layout, float] | None


def search(workload: Workload, ranks: int, machine: Machine, configured: Prediction | None = None) -> Search:
    """Rank every layout.

    Args:
        configured: of the layout that the settings have, ranked among the others even if no search would try it.
    """
    limit, out, tried = usable_bytes(machine), Counter[str](), 0
    fitting: list[tuple[float, Layout]] = []
    nearest: tuple[Layout, float] | None = None
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
        memory = fullest(workload, layout, stages).needed
        if memory > limit:
            out[_TOO_MUCH] += 1
            if nearest is None or memory < nearest[1]:
                nearest = layout, memory
            continue
        fitting.append((_rough_seconds(workload, layout, stages, machine), layout))
    fitting.sort(key=lambda entry: entry[0])
    ranked = [predict(workload, layout, machine) for _, layout in fitting[:_SIMULATED]]
    if configured is not None:
        tried += 1
        if configured.memory.needed <= limit:
            ranked.insert(0, configured)
        else:
            out[_TOO_MUCH] += 1
            if nearest is None or configured.memory.needed < nearest[1]:
                nearest = configured.layout, configured.memory.needed
    ranked.sort(key=lambda prediction: prediction.time.seconds)
    return Search(ranked, tried, out, nearest)


def _rough_seconds(workload: Workload, layout: Layout, stages: list[Stage], machine: Machine) -> float:
    mine, count = layout.stages_of(0), layout.microbatches(workload)
    messages = [message for number in mine for message in data_messages(workload, layout, stages[number], count)]
    return step_time(workload, layout, stages, messages, machine, simulated=False).seconds


def _stages_of(workload: Workload, layout: Layout, known: dict[tuple[object, ...], list[Stage]]) -> list[Stage]:
    """The stages of a layout, made once for those that divide the model alike."""
    key = (layout.tensor, layout.pipeline, layout.chunks, layout.flat, layout.shards)
    if key not in known:
        known[key] = stages_of(workload, layout)
    return known[key]
