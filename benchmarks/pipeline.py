# SPDX-License-Identifier: Apache-2.0
"""Step times of the pipeline schedules beside those that the simulator predicts from the measured costs of actions.

Every rank holds stages that wait instead of computing, so that a few cores can stand for many devices: the engine, the
messages between processes (gloo) and the weight-gradient queue are the real ones. A rank's forward, input gradient and
weight gradient take the given times, divided over its virtual stages.

    python -m benchmarks.pipeline --output benchmarks/pipeline_cpu.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.harness import provenance, publish
from megatron_bert.ending import command
from megatron_bert.planning.this_machine import run_ranks
from megatron_bert.training.timeline import gather_timeline, measured_costs
from parallel.mesh import ParallelLayout, ParallelMesh
from parallel.pipeline.actions import Schedule
from parallel.pipeline.engine import PipelineEngine
from parallel.pipeline.p2p import PipelineTransport
from parallel.pipeline.schedules import SCHEDULES, build_schedule
from parallel.pipeline.simulate import simulate
from parallel.weight_gradients import WeightGradientQueue, active_queue

CPU = torch.device("cpu")
#: Tokens and width of an activation: a message of 64 KiB.
TOKENS, WIDTH = 64, 256


@dataclass(frozen=True)
class Times:
    """Seconds that one stage takes for a microbatch."""

    forward: float
    backward_input: float
    backward_weight: float


class _Activations:
    """Counts what stages hold for their backward passes."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def hold(self) -> object:
        """Something that counts for as long as it lives."""
        held = _Held()
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(held, self._release)
        return held

    def _release(self) -> None:
        self.now -= 1


class _Held:
    pass


class _Waiting(torch.autograd.Function):
    """Waits where a stage would compute; the weight gradient's part is left to the queue, if there is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, times: Times, held: object, queue: WeightGradientQueue | None) -> Tensor:
        ctx.times, ctx.held, ctx.queue = times, held, queue
        time.sleep(times.forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        times, held, queue = ctx.times, ctx.held, ctx.queue
        ctx.held = None
        time.sleep(times.backward_input)

        def weight_gradient(_held: object = held) -> None:
            time.sleep(times.backward_weight)

        if queue is None:
            weight_gradient()
        else:
            queue.push(weight_gradient)
        return gradient, None, None, None


class WaitingStage(nn.Module):
    """A stage that takes given times."""

    def __init__(self, times: Times, activations: _Activations) -> None:
        super().__init__()
        self.times, self.activations = times, activations
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers, later."""
        return _Waiting.apply(x + self.bias, self.times, self.activations.hold(), active_queue())


def run_steps(
    schedule: Schedule, mesh: ParallelMesh, transport: PipelineTransport | None, times: Times, steps: int
) -> dict[str, Any]:
    """Measure steps of one schedule; every rank calls and gets the same."""
    v = schedule.chunks
    share = Times(times.forward / v, times.backward_input / v, times.backward_weight / v)
    activations = _Activations()
    rank = mesh.coordinate["pipeline"]
    stages = {index: WaitingStage(share, activations) for index in schedule.stages_of(rank)}
    engine = PipelineEngine(schedule, rank, stages, transport, dtype=torch.float32, device=CPU, record=True)
    first_input = torch.zeros(TOKENS, WIDTH)

    def forward(stage: int, received: Tensor | None, _microbatch: int) -> Tensor:
        out = stages[stage](first_input if received is None else received)
        return out.sum() if stage == schedule.stages - 1 else out

    measured, simulated, bubbles = [], [], []
    for step in range(steps + 1):
        dist.barrier()
        began = time.perf_counter()
        engine.run(forward, lambda _: (TOKENS, WIDTH))
        dist.barrier()
        seconds = time.perf_counter() - began
        timeline = gather_timeline(engine, mesh)
        if step == 0:  # connections are made in the first
            continue
        measured.append(seconds)
        simulated.append(simulate(schedule, measured_costs(timeline, schedule.stages)).makespan)
        bubbles.append(timeline.bubble)
    most = torch.tensor(activations.most)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    seconds, predicted = statistics.median(measured), statistics.median(simulated)
    kind = SCHEDULES[schedule.name]
    sizes = (schedule.ranks, schedule.microbatches, schedule.chunks)
    return {
        "schedule": schedule.name,
        "chunks": schedule.chunks,
        "measured_seconds": round(seconds, 4),
        "simulated_seconds": round(predicted, 4),
        "measured_over_simulated": round(seconds / predicted, 4),
        "all_measured_seconds": [round(value, 4) for value in measured],
        "bubble": round(statistics.median(bubbles), 4),
        "bubble_closed_form": round(kind.bubble(*sizes), 4),
        "peak_activations": most.item() / schedule.chunks,
        "peak_activations_closed_form": kind.peak(*sizes),
    }


def run_rank(rank: int, arguments: argparse.Namespace, report: Callable[[Any], None]) -> None:
    """One process of the pipeline."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = ParallelMesh(ParallelLayout(pipeline=arguments.pipeline), CPU)
    transport = PipelineTransport.create(mesh)
    times = Times(*(milliseconds / 1000 for milliseconds in arguments.milliseconds))
    results = []
    for name in SCHEDULES:
        schedule = build_schedule(name, arguments.pipeline, arguments.microbatches)
        results.append(run_steps(schedule, mesh, transport, times, arguments.steps))
    if rank == 0:
        report(results)
    dist.destroy_process_group()


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Results of all schedules, measured in processes of their own."""
    results: Any = torch.multiprocessing.get_context("spawn").SimpleQueue()
    run_ranks(arguments.pipeline, run_rank, arguments, results.put)
    return results.get()


@command("benchmarks.pipeline")
def main(given: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a step is 15% off its simulation, or zero-bubble H1 no faster than 1F1B."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pipeline", type=int, default=4, metavar="P", help="ranks")
    parser.add_argument("--microbatches", type=int, default=8, metavar="M", help="of one step")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="measured steps of each schedule")
    parser.add_argument(
        "--milliseconds",
        type=float,
        nargs=3,
        default=(40.0, 40.0, 40.0),
        metavar=("F", "B", "W"),
        help="of a rank's forward, input gradient and weight gradient for one microbatch",
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args(given)
    load_before = os.getloadavg()[0]
    results = measure(arguments)
    print(
        f"{'schedule':<18}{'measured':>10}{'simulated':>11}{'ratio':>8}{'bubble':>9}{'closed':>9}{'peak':>6}{'closed':>8}"
    )
    for row in results:
        print(
            f"{row['schedule']:<18}{row['measured_seconds']:>9.3f}s{row['simulated_seconds']:>10.3f}s"
            f"{row['measured_over_simulated']:>8.3f}{row['bubble']:>9.1%}{row['bubble_closed_form']:>9.1%}"
            f"{row['peak_activations']:>6g}{row['peak_activations_closed_form']:>8g}"
        )
    seconds = {row["schedule"]: row["measured_seconds"] for row in results}
    gain = seconds["1f1b"] / seconds["zero-bubble-h1"]
    print(f"zero-bubble-h1 is {gain:.3f} times as fast as 1f1b")
    report = {
        **provenance("pipeline", arguments=given),
        "load_average_before": round(load_before, 2),
        "settings": {
            "pipeline": arguments.pipeline,
            "microbatches": arguments.microbatches,
            "steps": arguments.steps,
            "milliseconds": list(arguments.milliseconds),
            "message_bytes": 4 * TOKENS * WIDTH,
        },
        "results": results,
        "zero_bubble_h1_speedup_over_1f1b": round(gain, 4),
    }
    publish(report, arguments.output)
    within = all(abs(row["measured_over_simulated"] - 1) <= 0.15 for row in results)
    return 0 if within and gain > 1 else 1


if __name__ == "__main__":
    sys.exit(main())
