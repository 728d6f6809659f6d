# SPDX-License-Identifier: Apache-2.0
"""``megatron-bert schedule``: draw a pipeline schedule, or compare several, before any run."""

from __future__ import annotations

import argparse
import shutil

from megatron_bert.arguments import check_outputs, given_path
from parallel.errors import UserError
from parallel.pipeline.actions import Schedule
from parallel.pipeline.chart import chrome_trace, gantt_png, text_grid
from parallel.pipeline.communication import outgoing
from parallel.pipeline.schedules import SCHEDULES, build_schedule
from parallel.pipeline.simulate import Costs, Timeline, simulate
from parallel.pipeline.validate import validate
from parallel.whole_files import reporting

_DESCRIPTION = """\
Draw a pipeline schedule in the terminal, or compare several in a table: idle share of the step (bubble) and
activations held, simulated and by closed form, and messages between ranks. Schedules:

"""

_NOTE = """\
bubble    idle share of the step; the closed form takes F = B = W and free messages, and is a lower bound for few
          microbatches
peak      activations of the fullest rank, in microbatches of all its layers
messages  of all ranks in one step"""


def add_schedule_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command line's parser."""
    lines = "\n".join(f"  {name:<18}{kind.description}" for name, kind in SCHEDULES.items())
    parser = subparsers.add_parser(
        "schedule",
        help="draw and compare pipeline schedules",
        description=_DESCRIPTION + lines,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pipeline", type=int, required=True, metavar="P", help="pipeline ranks")
    parser.add_argument("--microbatches", type=int, required=True, metavar="M", help="microbatches of one step")
    parser.add_argument("--schedule", required=True, metavar="NAME[,NAME...]", help="schedules, or all")
    parser.add_argument(
        "--virtual-stages", type=int, metavar="V", help="chunks per rank, where the schedule has a choice"
    )
    parser.add_argument(
        "--costs",
        default="1,1,1",
        metavar="F,B,W",
        help="times of forward, input gradient and weight gradient of all layers of a rank (default: 1,1,1)",
    )
    parser.add_argument("--communication", type=float, default=0.0, metavar="C", help="time of a message (default: 0)")
    parser.add_argument("--png", type=given_path, metavar="FILE", help="draw a Gantt chart of all schedules named")
    parser.add_argument(
        "--trace", type=given_path, metavar="FILE", help="write one schedule as a Chrome trace for Perfetto"
    )
    parser.set_defaults(func=run_schedule)


def run_schedule(arguments: argparse.Namespace) -> None:
    """Run the subcommand.

    Raises:
        UserError: sizes, names or costs that no schedule takes.
    """
    names = list(SCHEDULES) if arguments.schedule == "all" else arguments.schedule.split(",")
    if arguments.trace is not None and len(names) > 1:
        raise UserError(f"--trace writes one schedule and {len(names)} were named: name one.")
    check_outputs({"--png": arguments.png, "--trace": arguments.trace})
    forward, backward_input, backward_weight = _parse_costs(arguments.costs)
    results = []
    for name in names:
        chunks = _chunks(name, names, arguments.virtual_stages)
        schedule = build_schedule(name, arguments.pipeline, arguments.microbatches, chunks)
        validate(schedule)
        v = schedule.chunks
        costs = Costs(forward / v, backward_input / v, backward_weight / v, arguments.communication)
        results.append((schedule, simulate(schedule, costs)))
    if len(results) == 1:
        print(text_grid(results[0][1], width=shutil.get_terminal_size((120, 24)).columns), end="\n\n")
    print(f"{comparison_table(results)}\n\n{_NOTE}")
    if arguments.png is not None:
        with reporting("written", arguments.png, "give --png another file"):
            gantt_png([(_title(schedule), timeline) for schedule, timeline in results], arguments.png)
    if arguments.trace is not None:
        # One unit of the costs is shown as a millisecond.
        with reporting("written", arguments.trace, "give --trace another file"):
            chrome_trace(results[0][1], arguments.trace, microseconds=1e3)


def _parse_costs(text: str) -> tuple[float, float, float]:
    try:
        forward, backward_input, backward_weight = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--costs was given '{text}': give three numbers F,B,W, such as 1,1.3,0.8.") from None
    times = (forward, backward_input, backward_weight)
    if not all(0 < time < float("inf") for time in times):
        raise UserError(f"--costs was given '{text}': give three times above 0.")
    return times


def _chunks(name: str, names: list[str], virtual_stages: int | None) -> int | None:
    """The chunks of one of several schedules: the ones asked for apply where there is a choice."""
    if virtual_stages is None or len(names) == 1 or name not in SCHEDULES:
        return virtual_stages
    if not any(SCHEDULES[other].chunks[1] is None for other in names if other in SCHEDULES):
        raise UserError(f"--virtual-stages {virtual_stages} was given, but none of {', '.join(names)} has a choice.")
    return virtual_stages if SCHEDULES[name].chunks[1] is None else None


def _title(schedule: Schedule) -> str:
    chunks = f", {schedule.chunks} chunks per rank" if schedule.chunks > 1 else ""
    return f"{schedule.name}, {schedule.ranks} ranks, {schedule.microbatches} microbatches{chunks}"


def comparison_table(results: list[tuple[Schedule, Timeline]]) -> str:
    """Bubble, activations and messages of schedules, simulated and by closed form."""
    rows = [("schedule", "chunks", "time", "bubble", "closed form", "peak", "closed form", "messages")]
    for schedule, timeline in results:
        kind = SCHEDULES[schedule.name]
        sizes = (schedule.ranks, schedule.microbatches, schedule.chunks)
        messages = sum(outgoing(schedule, action) is not None for run in schedule.actions for action in run)
        rows.append(
            (
                schedule.name,
                str(schedule.chunks),
                f"{timeline.makespan:g}",
                f"{timeline.bubble:.1%}",
                f"{kind.bubble(*sizes):.1%}",
                f"{max(schedule.peak_activations()) / schedule.chunks:g}",
                f"{kind.peak(*sizes):g}",
                str(messages),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.rjust(width) if column else text.ljust(width) for column, (text, width) in enumerate(line))
        for line in (list(zip(row, widths, strict=True)) for row in rows)
    )
