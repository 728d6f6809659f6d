"""Sharded, asynchronous, atomic checkpoints over torch.distributed.checkpoint.

A checkpoint is a directory ``step_00000100`` with one file a rank, torch's ``.metadata`` and ``state.json``. It is
written as ``step_00000100.partial`` and renamed when every rank's data is on disk, so a directory of the final name is
always whole. Tensors are stored by global name and shape, so any layout can load what any other saved.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from parallel.errors import UserError

STATE_FILE = "state.json"
_NAME = re.compile(r"step_(\d{8,})")


def checkpoint_step(path: Path) -> int | None:
    """The step of a whole checkpoint directory; None for anything else."""
    match = _NAME.fullmatch(path.name)
    if match is None or not (path / ".metadata").is_file() or not (path / STATE_FILE).is_file():
        return None
    return int(match.group(1))


def latest_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint in ``root``, or None."""
    if not root.is_dir():
        return None
    whole = [(step, path) for path in root.iterdir() if (step := checkpoint_step(path)) is not None]
    return max(whole)[1] if whole else None


def read_state(path: Path) -> dict[str, Any]:
    """What was saved beside the tensors.

    Raises:
        UserError: the directory is not a whole checkpoint.
    """
    try:
        return json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path} is not a checkpoint: it holds no {STATE_FILE}; give a step_... directory") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path / STATE_FILE} is damaged at offset {error.pos}: use another checkpoint") from None


def load_tensors(path: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fill tensors in place from a checkpoint, whatever layout wrote it.

    Args:
        path: a checkpoint directory.
        tensors: global name -> tensor (a DTensor where it is sharded) to fill; the checkpoint may hold more.
        group: a group with CPU collectives over all ranks; None to load in this process alone.

    Raises:
        UserError: the checkpoint cannot be read, lacks a tensor, or holds it in another shape.
    """
    reader = dcp.FileSystemReader(path)
    try:
        stored = reader.read_metadata().state_dict_metadata
    except Exception as error:
        raise UserError(f"checkpoint {path} cannot be read ({error}): use another one") from None
    for name, tensor in tensors.items():
        entry = stored.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"checkpoint {path} holds no tensor {name}: it was saved from another kind of model")
        if entry.size != tensor.shape:
            raise UserError(
                f"checkpoint {path} holds {name} in shape {tuple(entry.size)}, but the model settings make it "
                f"{tuple(tensor.shape)}: use the settings it was saved with"
            )
    try:
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:
        failures = "; ".join(str(failure[0]) for failure in error.failures.values())
        raise UserError(f"checkpoint {path} cannot be read ({failures}): use another one") from None


class CheckpointWriter:
    """Writes the checkpoints of a run, in the background if asked, and keeps the newest.

    Every rank constructs it at the same point and calls :meth:`save` at the same steps.

    Args:
        root: directory of the checkpoints.
        keep: how many to keep; 0 keeps all.
        asynchronous: return from :meth:`save` when the tensors are copied, and write while training goes on.
    """

    def __init__(self, root: Path, *, keep: int, asynchronous: bool) -> None:
        self.root, self.keep, self.asynchronous = root, keep, asynchronous
        # A group of its own: the background thread's collectives must not interleave with those of training.
        self.group = dist.new_group(backend="gloo")
        self.is_first = dist.get_rank() == 0
        self._pending: Future[Any] | None = None
        if self.is_first:
            root.mkdir(parents=True, exist_ok=True)
            for leftover in root.glob("step_*.partial"):
                shutil.rmtree(leftover)
        dist.barrier(self.group)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Save tensors by global name, and a JSON-able state, as the checkpoint of a step.

        An earlier save still being written is finished first. Returns the directory the checkpoint will have.
        """
        self.finish()
        final = self.root / f"step_{step:08d}"
        partial = final.with_name(final.name + ".partial")
        if self.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            (partial / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        dist.barrier(self.group)
        writer = dcp.FileSystemWriter(partial)
        if self.asynchronous:
            # Only this thread's copy of the tensors is taken now; the coordinator's save ends after every rank's data
            # is on disk, so its completion is the moment to give the directory its name.
            pending = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
            assert isinstance(pending, Future)
            self._pending = pending
            if self.is_first:
                pending.add_done_callback(lambda done: None if done.exception() else self._commit(partial, final))
        else:
            dcp.save(tensors, storage_writer=writer, process_group=self.group)
            if self.is_first:
                self._commit(partial, final)
            dist.barrier(self.group)
        return final

    def finish(self) -> None:
        """Wait for a save in the background, and raise what went wrong in it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
            dist.barrier(self.group)

    def _commit(self, partial: Path, final: Path) -> None:
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        directory = os.open(self.root, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        whole = sorted(path for path in self.root.iterdir() if checkpoint_step(path) is not None)
        for old in whole[: -self.keep] if self.keep else []:
            shutil.rmtree(old)
