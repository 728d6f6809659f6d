# SPDX-License-Identifier: Apache-2.0
"""A run from its opening to its end, whatever it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bert.config import RunSettings
from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.training.metrics import Report
from megatron_bert.training.objective import Objective
from megatron_bert.training.run import Start, check_device, find_start, set_aside, write_start
from megatron_bert.training.run_lock import RunLock, owning
from megatron_bert.training.signals import STOPPED_FILE, StopRequest
from megatron_bert.training.step_report import describe
from megatron_bert.training.trackers import check_trackers
from megatron_bert.training.trainer import Trainer
from parallel.checkpoint import checkpoint_step, read_state
from parallel.errors import DamagedCheckpointError, UserError, called
from parallel.host_order import gather_hosts, host_order_warnings
from parallel.mesh import ParallelLayout, ParallelMesh
from parallel.object_collectives import on_first_rank
from parallel.process_group import World, launched_rank, launched_world_size, process_group, wait_as_spare
from parallel.whole_files import write_json


class Stopped(NamedTuple):
    """A run was asked to stop, and did after a step."""

    reason: str
    step: int


@dataclass(frozen=True)
class Opened:
    """What a command that trains has while it lasts.

    Attributes:
        run_dir: directory of the command; several runs have theirs below it.
        stop: asks a run to stop.
    """

    run_dir: Path
    world: World
    mesh: ParallelMesh
    lock: RunLock
    stop: StopRequest


def is_spare(layout: ParallelLayout) -> bool:
    """Whether this process has no place in a layout; then it has waited until the others ended."""
    if launched_rank() < layout.world_size:
        return False
    wait_as_spare()
    return True


@contextmanager
def opened(settings: RunSettings, layout: ParallelLayout, *, ends_process: bool) -> Iterator[Opened]:
    """Form the world of a command and own its directory; every rank of the layout calls.

    Args:
        ends_process: whether the process ends after the block; see :class:`StopRequest`.

    Raises:
        UserError: the world cannot be formed, the device cannot do what is asked, or another run owns the directory.
    """
    training, timeout = settings.training, settings.parallel.timeout_seconds
    with (
        called(device="training.device", timeout_seconds="parallel.timeout_seconds"),
        process_group(training.device, timeout, layout.world_size) as world,
    ):
        check_device(settings, world)
        on_first_rank(lambda: check_trackers(settings.logging.trackers))
        with (
            owning(training.run_dir, timeout) as lock,
            StopRequest(training.max_minutes, ends_process=ends_process, lock=lock) as stop,
        ):
            yield Opened(training.run_dir, world, ParallelMesh(layout, world.device), lock, stop)


class Procedure(ABC):
    """What one run of a command does around training; every rank calls."""

    #: Copied into the run directory, for a run whose model is used with it.
    tokenizer: Tokenizer | None = None

    def begin(self, trainer: Trainer, report: Report) -> None:  # noqa: B027
        """Before the first step of a new run, or when one goes on; nothing by default."""

    def finish(self, trainer: Trainer, report: Report) -> Any:  # noqa: ARG002
        """After the last step; what the run has found."""
        return None

    @abstractmethod
    def draw(self, run_dir: Path, objective: Objective) -> object:
        """Draw the curves of a run, which has reached its end or stops; rank 0 calls."""


def train(
    command: Opened, settings: RunSettings, objective: Objective, procedure: Procedure, lock: RunLock | None = None
) -> Any | Stopped:
    """One run, from its beginning or the checkpoint that it goes on from to its end; every rank calls.

    Args:
        lock: of its directory, where that is below the command's.

    Returns:
        What the procedure has found; or why and where the run stopped before its end.

    Raises:
        UserError: as :func:`start_trainer` and :meth:`Trainer.run`.
    """
    run_dir, active = settings.training.run_dir, command.world.is_first
    # Looks for the checkpoint again: who owned the directory until now may have saved since.
    start, trainer = start_trainer(settings, objective, command.mesh, command.world, lock or command.lock)
    placement = _process_notes(command.mesh.layout, start.checkpoint)
    objective.prepare(command.mesh, command.world)
    on_first_rank(lambda: write_start(settings, procedure.tokenizer))
    with Report(run_dir, settings.logging, active=active, start=trainer.step, steps=objective.total_steps) as report:
        for line in (describe(trainer), *objective.describe_data(trainer.step)):
            report.say(line)
        if start.checkpoint is not None:
            report.say(f"resuming from {start.checkpoint}")
        elif objective.starts_from is not None:
            report.say(f"starting from the weights of {objective.starts_from}")
        for note in (*trainer.model.notes, *start.notes, *placement):
            report.say(f"note: {note}")
        with called(timeout_seconds="checkpoint.timeout_seconds"):
            procedure.begin(trainer, report)
            reason = trainer.run(command.stop, report)
        report.attempt("curves.png", "there is no picture of the run", lambda: procedure.draw(run_dir, objective))
        if reason is None:
            found = procedure.finish(trainer, report)
        else:
            report.say(f"stopped by {reason} after step {trainer.step}: the same command goes on from there")
            found = Stopped(reason, trainer.step)
    trainer.close()
    if active and reason is not None:
        # For what started the run.
        write_json(command.run_dir / STOPPED_FILE, {"reason": reason, "step": trainer.step})
    return found


def _process_notes(layout: ParallelLayout, resume_from: Path | None) -> list[str]:
    """What to say of the processes: where they sit, and whether there are fewer than before; every rank calls."""
    notes = host_order_warnings(layout, gather_hosts())
    before = read_state(resume_from).get("data_size") if resume_from is not None else None
    if before is not None and before != layout.data:
        way = "fewer" if layout.data < before else "more"
        notes.append(
            f"elastic: {way} processes than before, data-parallel size {before} -> {layout.data}; the batch is the same"
        )
    spares = launched_world_size() - layout.world_size
    if spares > 0:
        notes.append(f"elastic: {spares} of {launched_world_size()} processes have no place in the layout and wait")
    return notes


def start_trainer(
    settings: RunSettings, objective: Objective, mesh: ParallelMesh, world: World, lock: RunLock
) -> tuple[Start, Trainer]:
    """Build the trainer from the newest checkpoint that is whole; every rank calls.

    Damage that shows only when the tensors are read leads to the checkpoint before. Damaged ones get another name.

    Raises:
        UserError: as :func:`find_start`; or a checkpoint that is named, not found, is damaged.
    """
    bad: list[DamagedCheckpointError] = []
    kept: list[tuple[int, str]] = []

    def find() -> Start:
        for error in bad:
            kept.append(set_aside(error))
        try:
            start = find_start(settings, objective)
        except UserError as error:
            raise UserError("; ".join([*(text for _, text in kept), str(error)])) from None
        kept.extend(set_aside(error) for error in start.damaged)
        good = 0 if start.checkpoint is None else checkpoint_step(start.checkpoint) or 0
        notes = [f"{text}: steps {good + 1} to {step} are trained again" for step, text in kept]
        return start._replace(notes=(*notes, *start.notes), damaged=())

    while True:
        start = on_first_rank(find)
        try:
            return start, Trainer(settings, objective, mesh, world, start.checkpoint, lock)
        except DamagedCheckpointError as error:
            if settings.checkpoint.resume != "auto":
                raise
            bad[:] = [error]
