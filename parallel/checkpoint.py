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

from parallel.errors import UserError, brief
from parallel.process_group import new_group

STATE_FILE = "state.json"
_LONGEST_STATE = 64 << 20
_NAME = re.compile(r"step_(\d{8,})")


def checkpoint_step(path: Path) -> int | None:
    """The step of a whole checkpoint directory; None for anything else."""
    match = _NAME.fullmatch(path.name)
    if match is None or not (path / ".metadata").is_file() or not (path / STATE_FILE).is_file():
        return None
    return int(match.group(1))


def whole_checkpoints(root: Path) -> dict[int, Path]:
    """Step -> directory of every whole checkpoint in ``root``, the newest last; {} where there is no ``root``."""
    if not root.is_dir():
        return {}
    return dict(sorted((step, path) for path in root.iterdir() if (step := checkpoint_step(path)) is not None))


def latest_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint in ``root``, or None."""
    return next(reversed(whole_checkpoints(root).values()), None)


def read_state(path: Path) -> dict[str, Any]:
    """What was saved beside the tensors.

    Raises:
        UserError: the directory is not a whole checkpoint.
    """
    try:
        with (path / STATE_FILE).open(encoding="utf-8") as file:
            text = file.read(_LONGEST_STATE)
            if file.read(1):
                raise ValueError(f"more than {_LONGEST_STATE:,} characters")
        state = json.loads(text)
    except OSError:
        raise UserError(f"{path} is not a checkpoint: it holds no {STATE_FILE}; give a step_... directory") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path / STATE_FILE} is damaged ({brief(error)}): use another checkpoint") from None
    if not isinstance(state, dict):
        raise UserError(f"{path / STATE_FILE} is damaged (not a JSON object): use another checkpoint")
    return state


def _reasons(error: dcp.CheckpointException) -> str:
    """What went wrong on any rank, each cause once, on one line."""
    return "; ".join(dict.fromkeys(" ".join(str(failure[0]).split()) for failure in error.failures.values()))


def _not_written(path: Path, error: dcp.CheckpointException) -> UserError:
    return UserError(
        f"checkpoint {path} could not be written ({_reasons(error)}): mend that, and the same command goes on from the "
        "checkpoint before it"
    )


class CheckpointWriter:
    """Writes the checkpoints of a run, in the background if asked, and keeps the newest.

    Every rank constructs it at the same point and calls :meth:`save` at the same steps.

    Args:
        root: directory of the checkpoints.
        keep: how many to keep; 0 keeps all.
        asynchronous: return from :meth:`save` when the tensors are copied, and write while training goes on.

    Attributes:
        protected: step whose checkpoint those saved from now on leave beside the newest ones; None for none.
    """

    def __init__(self, root: Path, *, keep: int, asynchronous: bool) -> None:
        self.root, self.keep, self.asynchronous = root, keep, asynchronous
        # A group of its own: the background thread's collectives must not interleave with those of training.
        self.group = new_group(backend="gloo")
        self.is_first = dist.get_rank() == 0
        self.protected: int | None = None
        self._pending: tuple[Path, Future[Any]] | None = None
        if self.is_first:
            root.mkdir(parents=True, exist_ok=True)
            for leftover in root.glob("step_*.partial"):
                shutil.rmtree(leftover)
        dist.barrier(self.group)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Save tensors by global name, and a JSON-able state, as the checkpoint of a step.

        An earlier save still being written is finished first. Returns the directory the checkpoint will have.

        Raises:
            UserError: this checkpoint, or the one before it, cannot be written.
        """
        self.finish()
        final = self.root / f"step_{step:08d}"
        partial = final.with_name(final.name + ".partial")
        if self.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            with (partial / STATE_FILE).open("w", encoding="utf-8") as file:
                json.dump(state, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
        dist.barrier(self.group)
        writer = dcp.FileSystemWriter(partial)
        if self.asynchronous:
            # Only this thread's copy of the tensors is taken now; the coordinator's save ends after every rank's data
            # is on disk, so its completion is the moment to give the directory its name.
            pending = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
            assert isinstance(pending, Future)
            self._pending = (
                final,
                self._committed(pending, partial, final, self.protected) if self.is_first else pending,
            )
        else:
            try:
                dcp.save(tensors, storage_writer=writer, process_group=self.group)
            except dcp.CheckpointException as error:
                raise _not_written(final, error) from None
            if self.is_first:
                self._commit(partial, final, self.protected)
            dist.barrier(self.group)
        return final

    def close(self) -> None:
        """Give up the group, after :meth:`finish`; every rank calls."""
        dist.destroy_process_group(self.group)

    def finish(self) -> None:
        """Wait for a save in the background, and raise what went wrong in it.

        Raises:
            UserError: the checkpoint cannot be written.
        """
        if self._pending is not None:
            (final, pending), self._pending = self._pending, None
            try:
                pending.result()
            except dcp.CheckpointException as error:
                raise _not_written(final, error) from None
            dist.barrier(self.group)

    def _committed(self, written: Future[Any], partial: Path, final: Path, protected: int | None) -> Future[None]:
        """Done when the directory has its final name: a future wakes who waits for it before it calls back."""
        committed: Future[None] = Future()

        def commit(done: Future[Any]) -> None:
            try:
                done.result()
                self._commit(partial, final, protected)
            except BaseException as error:
                committed.set_exception(error)
            else:
                committed.set_result(None)

        written.add_done_callback(commit)
        return committed

    def _commit(self, partial: Path, final: Path, protected: int | None) -> None:
        if final.exists():
            self._remove(final)
        partial.rename(final)
        directory = os.open(self.root, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        # The one just written stays, even beside later ones that a run resumed from an earlier step has left behind.
        others = [
            path for path in self.root.iterdir() if checkpoint_step(path) not in (None, protected) and path != final
        ]
        others.sort(key=lambda path: checkpoint_step(path) or 0)
        for old in others[: max(0, len(others) - self.keep + 1)] if self.keep else []:
            self._remove(old)

    @staticmethod
    def _remove(path: Path) -> None:
        """Delete under another name, so that a crash on the way leaves nothing that passes for a whole checkpoint."""
        shutil.rmtree(path.rename(path.with_name(path.name + ".old.partial")))
