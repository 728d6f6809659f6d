# SPDX-License-Identifier: Apache-2.0
"""The trainer of a run at the checkpoint that it goes on from, or at the beginning."""

from __future__ import annotations

from megatron_bert.config import RunSettings
from megatron_bert.training.first_rank import on_first_rank
from megatron_bert.training.objective import Objective
from megatron_bert.training.run import Start, find_start, set_aside
from megatron_bert.training.run_lock import RunLock
from megatron_bert.training.trainer import Trainer
from parallel.checkpoint import checkpoint_step
from parallel.errors import DamagedCheckpointError, UserError
from parallel.mesh import ParallelMesh
from parallel.process_group import World


def start_trainer(
    settings: RunSettings, objective: Objective, mesh: ParallelMesh, world: World, lock: RunLock
) -> tuple[Start, Trainer]:
    """Build the trainer from the newest checkpoint that is whole; every rank calls.

    Damage that shows only when the tensors are read leads to the checkpoint before. Damaged ones get another name.

    Args:
        settings: of the run.
        objective: what it trains.
        mesh: where it is laid out.
        world: its processes.
        lock: of its directory.

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
