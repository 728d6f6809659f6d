"""The beginning of a run: its directory, its number formats, and the checkpoint it goes on from."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_bert.config import RunSettings
from megatron_bert.training.signals import note_start
from parallel.checkpoint import STATE_FILE, checkpoint_step, latest_checkpoint, read_state
from parallel.errors import UserError
from parallel.process_group import World

#: What a checkpoint says beside its tensors if a run wrote it, and it can be resumed.
RUN_STATE = ("step", "consumed_samples", "optimizer", "loss_scale", "tokenizer")


def open_run(settings: RunSettings, world: World) -> None:
    """Make the run directory with its ``config.yaml``, and set up the device; every rank calls.

    Raises:
        UserError: the device cannot compute in the format asked for.
    """
    compute = settings.precision.compute
    if world.device.type == "cpu" and compute == "float16":
        raise UserError("precision.compute float16 needs a GPU and this machine has none: choose bfloat16 or float32")
    if world.is_first:
        settings.training.run_dir.mkdir(parents=True, exist_ok=True)
        (settings.training.run_dir / "config.yaml").write_text(settings.dump(), encoding="utf-8")
        note_start(settings.training.run_dir)
    dist.barrier()
    if world.device.type == "cuda" and compute != "float32":
        torch.set_float32_matmul_precision("high")


def find_resume(settings: RunSettings) -> Path | None:
    """The checkpoint to go on from.

    Raises:
        UserError: a checkpoint is named that is not there, or that holds a model without the state of a run.
    """
    wanted = settings.checkpoint.resume
    if wanted == "none":
        return None
    if wanted == "auto":
        path = latest_checkpoint(settings.training.run_dir / "checkpoints")
        if path is None:
            return None
    else:
        path = Path(wanted)
        if checkpoint_step(path) is None:
            raise UserError(
                f"checkpoint.resume is {wanted}, which is no whole checkpoint: give auto, none or a step_... directory"
            )
    missing = [name for name in RUN_STATE if name not in read_state(path)]
    if missing:
        raise UserError(
            f"{path / STATE_FILE} holds no {', '.join(missing)}, so the run that wrote it cannot go on: to start from "
            "its weights, set model.from to it and checkpoint.resume=none"
        )
    return path
