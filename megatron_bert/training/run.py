# SPDX-License-Identifier: Apache-2.0
"""The beginning of a run: its directory, its number formats, and the checkpoint it goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from megatron_bert.config import RunSettings
from megatron_bert.data.tokenizers import RUN_FOLDER, Tokenizer
from megatron_bert.training.objective import Objective
from megatron_bert.training.resuming import check_resume
from megatron_bert.training.signals import STOPPED_FILE
from parallel.checkpoint import STATE_FILE, check_checkpoint, checkpoint_step, named_checkpoints, read_state
from parallel.errors import DamagedCheckpointError, UserError, brief
from parallel.process_group import World
from parallel.whole_files import reporting, whole_directory, write_text

#: What a checkpoint says beside its tensors if a run wrote it, and it can be resumed, and of which kind it is.
RUN_STATE: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "consumed_samples": int,
    "optimizer": dict,
    "loss_scale": dict,
    "tokenizer": str,
}


class Start(NamedTuple):
    """Where a run begins.

    Attributes:
        checkpoint: to go on from; None to begin with the first step.
        notes: sentences on what is not as it was up to there.
        damaged: newer checkpoints that are not whole.
    """

    checkpoint: Path | None
    notes: tuple[str, ...] = ()
    damaged: tuple[DamagedCheckpointError, ...] = ()


def check_device(settings: RunSettings, world: World) -> None:
    """The device must compute in the format asked for; every rank calls, and rounds matrix products accordingly.

    Raises:
        UserError: it cannot.
    """
    compute = settings.precision.compute
    if world.device.type == "cpu" and compute == "float16":
        raise UserError("precision.compute float16 needs a GPU and this machine has none: choose bfloat16 or float32")
    if world.device.type == "cuda" and compute != "float32":
        torch.set_float32_matmul_precision("high")


def write_start(settings: RunSettings, tokenizer: Tokenizer | None = None) -> None:
    """Write what a run directory says of the run that now begins or goes on; rank 0 calls, once all is checked.

    Args:
        tokenizer: to keep a copy of, for a run whose model is used with it.

    Raises:
        UserError: the directory cannot be written to.
    """
    run_dir = settings.training.run_dir
    with reporting("written to", f"training.run_dir {run_dir}", "give another directory"):
        if tokenizer is not None:
            with whole_directory(run_dir / RUN_FOLDER) as folder:
                tokenizer.save(folder)
        write_text(run_dir / "config.yaml", settings.dump())
        (run_dir / STOPPED_FILE).unlink(missing_ok=True)


def find_start(settings: RunSettings, objective: Objective) -> Start:
    """Where the run begins; nothing is written.

    Raises:
        UserError: as :func:`find_resume`; or the checkpoint is of another model, vocabulary, task or kind of run, or
            beyond the last step.
    """
    path, damaged = find_resume(settings)
    if path is None:
        return Start(None)
    state = read_state(path)
    objective.check_identity(state, str(path))
    notes = check_resume(settings, objective.config, objective.fixed_settings, state, path)
    if state["step"] > objective.total_steps:
        raise UserError(
            f"{path} has trained {state['step']} steps, but the run is to have {objective.total_steps}: raise "
            "training.steps (or training.epochs), or set checkpoint.resume to an earlier checkpoint"
        )
    return Start(path, tuple(notes), damaged)


def find_resume(settings: RunSettings) -> tuple[Path | None, tuple[DamagedCheckpointError, ...]]:
    """The checkpoint to go on from, and newer ones that are damaged.

    Raises:
        UserError: a checkpoint is named that is not there or that holds a model without the state of a run; or the run
            directory holds later ones than the one that is named, or any where none is wanted; or none that is whole.
    """
    automatic = settings.checkpoint.resume == "auto"
    path, damaged = newest_whole(settings.training.run_dir / "checkpoints") if automatic else (_named(settings), ())
    if path is None:
        return None, ()
    state = read_state(path)
    missing = [name for name in RUN_STATE if name not in state]
    if missing:
        raise UserError(
            f"{path / STATE_FILE} holds no {', '.join(missing)}, so the run that wrote it cannot go on: to start from "
            "its weights, set model.from to it and checkpoint.resume=none"
        )
    return path, damaged


def newest_whole(root: Path) -> tuple[Path | None, tuple[DamagedCheckpointError, ...]]:
    """The newest checkpoint whose files are all there, and what is wrong with those after it; None without any.

    Raises:
        UserError: there are checkpoints, and none of them is whole.
    """
    path, damaged = _search(root)
    faults = [f"{Path(str(error.path)).name}: {error.fault}" for error in damaged]
    faults += [f"{aside.name} was set aside" for aside in sorted(root.glob("step_*.damaged*"))]
    if path is None and faults:
        raise UserError(
            f"no checkpoint in {root} is whole ({'; '.join(faults)}): bring one back from a copy, or remove them to "
            "begin with the first step"
        )
    return path, damaged


def _search(root: Path) -> tuple[Path | None, tuple[DamagedCheckpointError, ...]]:
    damaged: list[DamagedCheckpointError] = []
    for path in reversed(named_checkpoints(root).values()):
        try:
            check_checkpoint(path)
            _check_kinds(path)
            return path, tuple(damaged)
        except DamagedCheckpointError as error:
            damaged.append(error)
    return None, tuple(damaged)


def _check_kinds(path: Path) -> None:
    """Values of other kinds than a run writes are damage that no checksum covers in old checkpoints."""
    state = read_state(path)
    for name, kind in RUN_STATE.items():
        if name in state and (not isinstance(state[name], kind) or isinstance(state[name], bool)):
            raise DamagedCheckpointError(path, f"{name} in {STATE_FILE} is {brief(state[name])}")


def set_aside(error: DamagedCheckpointError) -> tuple[int, str]:
    """Give a damaged checkpoint another name, so that it is neither read nor removed. Rank 0 calls.

    Returns:
        Its step, and a sentence on it.

    Raises:
        OSError: it cannot be renamed.
    """
    path = Path(str(error.path))
    names = (path.with_name(f"{path.name}.damaged{number}") for number in ("", *(f".{n}" for n in range(2, 1000))))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    step = int(path.name.removeprefix("step_"))
    return step, f"checkpoint {path.name} cannot be read ({error.fault}) and is kept as {aside.name}"


def _named(settings: RunSettings) -> Path | None:
    """The checkpoint that is named, None for none; or the newest that this very command has saved since it began there.

    Later checkpoints of anything else are refused: the next start would take the last of them for the newest.
    """
    wanted, root = settings.checkpoint.resume, settings.training.run_dir / "checkpoints"
    newest, _ = _search(root)
    # Asked first: the checkpoint that the command began with may have been one of these, and be gone by now.
    mine = settings.as_json()
    if newest is not None and read_state(newest).get("settings") == mine:
        return newest
    path = None if wanted == "none" else Path(wanted)
    step = -1 if path is None else checkpoint_step(path)
    if step is None:
        raise UserError(
            f"checkpoint.resume is {path}, which is not a whole checkpoint: give auto, none or a step_... directory"
        )
    later = [found.name for own_step, found in named_checkpoints(root).items() if own_step > step]
    if not later:
        return path
    begins = "checkpoint.resume is none" if path is None else f"checkpoint.resume is {path}"
    raise UserError(
        f"{begins}, but {root} holds later checkpoints of another command: {', '.join(later)}; remove them to begin "
        "there, set checkpoint.resume=auto to go on from the last of them, or set another training.run_dir to keep both"
    )
