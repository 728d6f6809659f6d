# SPDX-License-Identifier: Apache-2.0
"""A Slurm job that is to be submitted, and the checks before it is queued."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_bert.config import RunSettings
from megatron_bert.config_file import load_sections
from megatron_bert.tables import RUNS, found_at
from parallel.errors import UserError
from parallel.mesh import ParallelLayout

Style = Literal["torchrun", "srun"]
#: Stands for the number of the array task in settings of a job array, as in file names of sbatch.
TASK = "%a"
_RUN_DIR = "training.run_dir="
#: Times as sbatch takes them: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS.
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
#: A condition on other jobs as sbatch takes it.
_CONDITION = re.compile(
    r"singleton|(?:after(?::\d+(?:_\d+|_\*)?(?:\+\d+)?)+)"
    r"|(?:(?:afterany|afterburstbuffer|aftercorr|afternotok|afterok)(?::\d+(?:_\d+|_\*)?)+)"
)


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What the user asks for; fields are named as the arguments of the command line.

    Attributes:
        subcommand: to run on the nodes.
        min_nodes: fewest nodes to start with; None for a job of one size.
        gpus_per_node: processes per node, each with a GPU.
        time: time limit, as sbatch takes it.
        style: one torchrun a node that starts its processes, or one task of srun per process.
        name: of the job; the run directory's when None.
        partition, account: override the site's.
        dependency: as sbatch takes it.
        array: task numbers as sbatch takes them, such as ``0-9%1``.
    """

    subcommand: str
    config: Path
    overrides: list[str]
    nodes: int
    min_nodes: int | None
    gpus_per_node: int
    time: str
    style: Style
    name: str | None
    partition: str | None
    account: str | None
    dependency: str | None
    array: str | None

    @property
    def is_chain(self) -> bool:
        """Whether the tasks of the array run one after the other: parts of one run."""
        return self.array is not None and self.array.endswith("%1")


@dataclass(frozen=True, kw_only=True)
class CheckedJob:
    """A request that fits.

    Attributes:
        run_dir: directory of the run, with :data:`TASK` where tasks of an array differ.
        overrides: of the request and those the request implies, without the run directory.
        node_counts: numbers of nodes the job can run on, largest first.
        layout: with all nodes.
        notes: what the user should know.
    """

    request: JobRequest
    run_dir: str
    overrides: list[str]
    node_counts: list[int]
    layout: ParallelLayout
    notes: list[str]


def _checked(command: str, config: Path, overrides: list[str], world_size: int) -> tuple[RunSettings, ParallelLayout]:
    """Settings of a command that trains, and their layout, checked for a number of processes."""
    settings = load_sections(config, overrides, found_at(RUNS[command].settings))
    return settings, found_at(RUNS[command].check)(settings, world_size)


def check_words(texts: Iterable[str], time: str, dependency: str | None) -> int:
    """Check what any batch script holds; seconds of the time limit.

    Args:
        time: limit, as sbatch takes it.

    Raises:
        UserError: a script cannot hold a word, or sbatch would not take the rest.
    """
    for text in texts:
        if not text.isprintable():
            raise UserError(
                f"{text!r} holds a line break or another control character, which a batch script cannot hold"
            )
    limit = seconds_of(time)
    if dependency is not None:
        check_dependency(dependency)
    return limit


def check_job(request: JobRequest, stop_seconds: int) -> CheckedJob:
    """Every check that needs no Slurm.

    Args:
        stop_seconds: how long before the time limit the run is to stop.

    Raises:
        UserError: the settings do not fit the number of processes, or two parts of the request do not go together.
    """
    for name, value in (("nodes", request.nodes), ("gpus-per-node", request.gpus_per_node)):
        if value < 1:
            raise UserError(f"--{name} is {value}: give 1 or more")
    fewest = request.nodes if request.min_nodes is None else request.min_nodes
    if not 1 <= fewest <= request.nodes:
        raise UserError(f"--min-nodes is {fewest}: give 1 to --nodes ({request.nodes})")
    words = (str(request.config), *request.overrides, request.name or "")
    limit = check_words(words, request.time, request.dependency)
    if limit <= stop_seconds:
        raise UserError(
            f"--time {request.time} is {limit} seconds, but the run is to save and stop {stop_seconds} seconds before "
            "it is over: give more time, or lower stop_seconds in the site's file"
        )
    overrides = [text for text in request.overrides if not text.startswith(_RUN_DIR)]
    if fewest < request.nodes:
        overrides.append("parallel.elastic=true")
    directories = [text for text in request.overrides if text.startswith(_RUN_DIR)]
    # With every task its own number there is nothing to read: the first stands for all.
    sample = [text.replace(TASK, "0") for text in (*directories, *overrides)]
    settings, layout = _checked(request.subcommand, request.config, sample, request.nodes * request.gpus_per_node)
    run_dir = directories[-1].removeprefix(_RUN_DIR) if directories else str(settings.training.run_dir)
    if request.array is not None:
        check_array(request.array)
        if not request.is_chain and TASK not in run_dir:
            raise UserError(
                f"all tasks of the array {request.array} would write to {run_dir}: for parts of one run, one after the "
                f"other, use --array={request.array.split('%')[0]}%1; for runs of their own put {TASK} into "
                "training.run_dir and the settings that differ"
            )
    elif any(TASK in text for text in request.overrides):
        raise UserError(f"a setting holds {TASK}, the number of an array task, but there is no --array: add it")
    return CheckedJob(
        request=request,
        run_dir=run_dir,
        overrides=overrides,
        node_counts=_node_counts(request, fewest, sample),
        layout=layout,
        notes=_notes(request, layout),
    )


def _node_counts(request: JobRequest, fewest: int, sample: list[str]) -> list[int]:
    """Numbers of nodes whose every process has a place."""
    counts = [request.nodes]
    for nodes in range(request.nodes - 1, fewest - 1, -1):
        world_size = nodes * request.gpus_per_node
        try:
            layout = _checked(request.subcommand, request.config, sample, world_size)[1]
        except UserError:
            continue
        if layout.world_size == world_size:
            counts.append(nodes)
    if fewest < request.nodes == counts[-1]:
        raise UserError(
            f"no number of nodes from {fewest} to {request.nodes - 1} fits the settings, whose data axis "
            f"must divide training.global_batch_size / micro_batch_size: lower --min-nodes, or leave it out"
        )
    return counts


def _notes(request: JobRequest, layout: ParallelLayout) -> list[str]:
    notes = []
    if request.gpus_per_node % layout.tensor:
        notes.append(
            f"warning: parallel.tensor {layout.tensor} does not divide the {request.gpus_per_node} processes of a "
            "node, so tensor groups reach over the network: choose a size that does"
        )
    if request.array is not None and not request.is_chain:
        notes.append(f"the tasks of the array are runs of their own; {TASK} is the task's number")
    return notes


def seconds_of(time: str) -> int:
    """A time limit of sbatch in seconds.

    Raises:
        UserError: it is not one.
    """
    match = _CLOCK.fullmatch(time)
    if match is None:
        raise UserError(f"--time is {time!r}: give minutes, HH:MM:SS, or days as D-HH:MM:SS")
    days, first, second, third = (int(part or 0) for part in match.groups())
    if max(second, third) > 59 or (match[1] is not None and first > 23):
        raise UserError(f"--time is {time!r}: minutes and seconds go to 59, and hours beside days to 23")
    in_hours = match[1] is not None or match[4] is not None  # minutes come first otherwise
    hours, minutes, seconds = (first, second, third) if in_hours else (0, first, second)
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def check_array(array: str) -> list[int]:
    """The task numbers of an array such as ``0-9%1`` or ``1,3,8-20:4``.

    Raises:
        UserError: it is none.
    """
    numbers: list[int] = []
    tasks, _, at_once = array.partition("%")
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?", part)
        if match is None or ("%" in array and not re.fullmatch(r"[1-9]\d*", at_once)):
            raise UserError(f"--array is {array!r}: give task numbers such as 0-9, 1,3,5 or 0-9%1")
        first, last, step = match.groups()
        if int(last or first) < int(first):
            raise UserError(f"--array is {array!r}: {part.split(':')[0]} ends before it begins; give {last}-{first}")
        numbers += range(int(first), int(last or first) + 1, int(step or 1))
    repeated, count = Counter(numbers).most_common(1)[0]
    if count > 1:
        raise UserError(f"--array is {array!r}: task {repeated} is in it twice; name each once")
    return numbers


def check_dependency(dependency: str) -> None:
    """Refuse what sbatch would only refuse once everything is written.

    Raises:
        UserError: it is not a condition on other jobs.
    """
    if "," in dependency and "?" in dependency:
        raise UserError(
            f"--dependency is {dependency!r}: join conditions by commas (all) or question marks (any), not both"
        )
    if not all(_CONDITION.fullmatch(part) for part in re.split(r"[,?]", dependency)):
        raise UserError(
            f"--dependency is {dependency!r}: give afterok:JOB, afterany:JOB, afternotok:JOB, after:JOB, aftercorr:JOB "
            "or singleton, such as afterok:1234"
        )
