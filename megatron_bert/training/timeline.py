# SPDX-License-Identifier: Apache-2.0
"""The recorded timeline of a pipeline step, in the same form as a simulated one."""

from __future__ import annotations

from pathlib import Path

import torch

from parallel.mesh import ParallelMesh
from parallel.object_collectives import gather_objects
from parallel.pipeline.chart import chrome_trace, gantt_png
from parallel.pipeline.engine import PipelineEngine
from parallel.pipeline.simulate import Costs, TimedAction, Timeline, simulate


def gather_timeline(engine: PipelineEngine, mesh: ParallelMesh) -> Timeline:
    """The last step's actions of all pipeline ranks of this rank's line, on this host's clock; every rank calls.

    Clocks of hosts differ, so times count from the moment the ranks left a barrier together before the step.
    """
    mine = torch.tensor(
        [(event.start, event.end) for event in engine.recorded], dtype=torch.float64, device=mesh.device
    )
    mine = mine.reshape(-1, 2) - engine.step_began
    everyone = gather_objects(mine.cpu(), mesh.device_mesh.get_group("pipeline"))
    events = [
        TimedAction(rank, action, start, end)
        for rank, (actions, times) in enumerate(zip(engine.schedule.actions, everyone, strict=True))
        for action, (start, end) in zip(actions, times.tolist(), strict=True)
    ]
    return Timeline(engine.schedule.ranks, tuple(events))


def measured_costs(timeline: Timeline, stages: int) -> Costs:
    """Mean time of each kind of action of each stage, for the simulator; a full backward is halved."""

    def mean(stage: int, kinds: str) -> float:
        times = [e.end - e.start for e in timeline.events if e.action.stage == stage and e.action.kind in kinds]
        return sum(times) / len(times) if times else 0.0

    halves = [mean(stage, "B") / 2 for stage in range(stages)]
    return Costs(
        forward=[mean(stage, "F") for stage in range(stages)],
        backward_input=[mean(stage, "I") + halves[stage] for stage in range(stages)],
        backward_weight=[mean(stage, "W") + halves[stage] for stage in range(stages)],
    )


def write_timeline(timeline: Timeline, engine: PipelineEngine, directory: Path, step: int) -> None:
    """``step_N.json`` (Chrome trace) and ``step_N.png``: the recording over what the simulator makes of its costs."""
    directory.mkdir(parents=True, exist_ok=True)
    simulated = simulate(engine.schedule, measured_costs(timeline, engine.schedule.stages))
    chrome_trace(timeline, directory / f"step_{step:08d}.json")
    gantt_png(
        [
            (f"{engine.schedule.name}, step {step}, recorded", timeline),
            ("simulated with the recorded costs", simulated),
        ],
        directory / f"step_{step:08d}.png",
    )
