# SPDX-License-Identifier: Apache-2.0
"""Whether the ranks of a run that hold copies of weights and optimizer states hold the same."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from megatron_bert.training.run_state import RunState
from megatron_bert.training.staged_model import TIED_NAME
from parallel.checkpoint import latest_checkpoint
from parallel.checkpoint_reader import load_tensors
from parallel.errors import UserError
from parallel.parts import Part
from parallel.replicas import Copy, compare_replicas


def check_replicas(trainer: RunState) -> None:
    """Compare the copies; every rank calls, between steps.

    Raises:
        UserError: a rank's copy differs from those of others.
    """
    compare_replicas(_copies(trainer), trainer.mesh, lambda name: _saved(trainer, name))


def _copies(trainer: RunState) -> Iterator[Copy]:
    for parameters in (trainer.parameters, trainer.copies):
        for name, tensor in trainer.tensors(parameters).items():
            # Both stages that have the word embeddings update them alike.
            tied = trainer.model.tied is not None and name.endswith(f".{TIED_NAME}")
            yield Copy.of(name, tensor, *(("pipeline",) if tied else ()))


def _saved(trainer: RunState, name: str) -> Tensor | None:
    """This rank's part of a tensor in the newest checkpoint, if there is one."""
    path = latest_checkpoint(trainer.checkpoints.root)
    everything = trainer.tensors({**trainer.copies, **trainer.parameters})
    if path is None or name not in everything:
        return None
    before = Part.of(everything[name]).empty_like()
    try:
        load_tensors(path, {name: before})
    except UserError:
        return None
    return before.values
