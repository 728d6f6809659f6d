# SPDX-License-Identifier: Apache-2.0
"""Writing checkpoints: sharded, atomic, in the background if asked; and what is done when the file system refuses."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.checkpoint import HAS_MANIFEST
from parallel.checkpoint_directory import CheckpointDirectory
from parallel.checkpoint_plan import WritePlan, plan_writing, signature
from parallel.checkpoint_save import Save, SavedCheckpoint
from parallel.checkpoint_staging import Staging
from parallel.errors import ArgumentError
from parallel.file_process import FileProcess, write_pieces
from parallel.hosts import host_name
from parallel.manifest import MANIFEST_FILE, FileSums
from parallel.object_collectives import gather_objects, on_first_rank
from parallel.parts import Part, Sizes
from parallel.process_group import new_group
from parallel.whole_files import reason_of

#: Seconds by which a thread that waits for others outlasts the limit: who does not write is named by itself before.
_MARGIN_SECONDS = 60.0


class NotWrittenError(ArgumentError):
    """The file system refuses a checkpoint; those before it are there still."""


class CheckpointWriter:
    """Writes the checkpoints of a run, in the background if asked, and keeps the newest.

    Every rank constructs it at the same point and calls its methods at the same steps. What the
    file system refuses any rank is raised on all of them, and nothing of that checkpoint stays; those before it do. So
    it is with a file system that does not answer for too long, whose ranks are named.

    In the background, a thread copies what this rank writes into memory that is taken once and is all that saves need.
    A process of its own writes from there, so that the caller's interpreter is left alone; the thread waits for it and
    agrees with the other ranks. The caller is held up for the copy, or only for what is left of it when it comes to
    change the tensors; see :meth:`save`.

    Args:
        keep: how many to keep; 0 keeps all.
        asynchronous: return from :meth:`save` when the tensors are copied, and write while training goes on.
        timeout_seconds: how long a checkpoint may take to write.
        keep_every: checkpoints of steps that this divides are kept for good; 0 for none.

    Attributes:
        protected: steps whose checkpoints those saved from now on leave beside the newest ones.
    """

    def __init__(
        self, root: Path, *, keep: int, asynchronous: bool, timeout_seconds: float = 1800.0, keep_every: int = 0
    ) -> None:
        self.root, self.directory = root, CheckpointDirectory(root, keep, keep_every)
        self.asynchronous, self.limit = asynchronous, timeout_seconds
        self.group = self._new_group()
        self.is_first = dist.get_rank() == 0
        self.protected: frozenset[int] = frozenset()
        self._pending: Save | None = None
        self._saved: list[SavedCheckpoint] = []
        self._signature: dict[str, Any] = {}
        self._plan: WritePlan | None = None
        self._staging: Staging | None = None
        self._process: FileProcess | None = None

    def _new_group(self) -> dist.ProcessGroup:
        """A group of its own for the threads that write: they may wait for as long as a disk does.

        The caller's own collectives use the group of the run, so that a rank that hangs is noticed as soon as in any
        other part of a step.
        """
        return new_group(backend="gloo", timeout_seconds=self.limit + _MARGIN_SECONDS)

    def prepare(self) -> None:
        """Make the directory, and remove what an interrupted run left there.

        Raises:
            NotWrittenError: the directory cannot be made.
        """

        def prepare() -> None:
            try:
                self.directory.prepare()
            except OSError as error:
                raise _not_written(self.root, reason_of(error), what="the directory of checkpoints") from None

        on_first_rank(prepare)

    def save(
        self, step: int, tensors: dict[str, Tensor | Part], state: dict[str, Any], *, frozen: bool = False
    ) -> Path:
        """Save tensors by global name, and a JSON-able state, as the checkpoint of a step.

        An earlier save still being written is finished first. Returns the directory the checkpoint will have.

        Args:
            tensors: what this rank holds.
            state: for the file beside the tensors.
            frozen: the caller leaves the tensors as they are until it has called :meth:`copied`, such as for the
                forward and backward passes of the next step; a save in the background then copies meanwhile.

        Raises:
            NotWrittenError: this checkpoint, or the one before it, cannot be written.
        """
        began = time.perf_counter()
        self.finish()
        text = json.dumps(state | {HAS_MANIFEST: MANIFEST_FILE}, indent=1)
        plan = self._plan_for(tensors)
        device = Part.of(next(iter(tensors.values()))).values.device
        self._pending = save = Save(
            directory=self.directory,
            group=self.group,
            limit=self.limit,
            protected=self.protected,
            saved=self._saved,
            step=step,
            state=text,
            plan=plan,
            began=began,
        )
        if not self.asynchronous:  # in a thread as well: nobody can wait for just so long for a write of their own
            save.start(lambda path: _write_tensors(path, plan, tensors), device)
            self.finish()
            return save.final
        save.start(self._write_copy, device, lambda: self._copy(plan, tensors, device))
        save.stall = time.perf_counter() - began
        if not frozen:
            self.copied()
        return save.final

    def copied(self) -> None:
        """Return when tensors that are being saved may change: on a GPU, by work that is queued from now on."""
        if self._pending is not None:
            began = time.perf_counter()
            self._pending.wait_for_copy()
            self._pending.stall = (self._pending.stall or 0.0) + time.perf_counter() - began

    def close(self) -> None:
        """Give up the group, memory and process, after :meth:`finish`; every rank calls."""
        self._release()
        dist.destroy_process_group(self.group)

    @property
    def pending(self) -> bool:
        """Whether a save in the background has not been waited for."""
        return self._pending is not None

    @property
    def failed(self) -> bool:
        """Whether this rank knows already that the save in the background has failed: :meth:`finish` would raise."""
        return self._pending is not None and self._pending.failed

    def saved(self) -> list[SavedCheckpoint]:
        """The checkpoints that have been written since the last call; other ranks may learn of them later."""
        saved = list[SavedCheckpoint]()
        while self._saved:
            saved.append(self._saved.pop(0))
        return saved

    def finish(self) -> None:
        """Wait for a save in the background, and raise what went wrong in it, on every rank.

        Raises:
            NotWrittenError: the checkpoint cannot be written, or not in time.
        """
        if self._pending is None:
            return
        save, self._pending = self._pending, None
        reason, stuck = save.outcome()
        if stuck and save.writing:
            reason = f"rank {dist.get_rank()} on {host_name()} has not written its part"
        outcomes = gather_objects((reason, stuck))  # in the group of the run: the other one may be in use still
        reasons = list(dict.fromkeys(reason for reason, _ in outcomes if reason))
        if any(stuck for _, stuck in outcomes):
            # Threads that wait, for the file system or for each other, keep the group and the memory that they have.
            self.group = self._new_group()
            self._abandon()
            if save.give_up() and self.is_first:
                shutil.rmtree(save.partial, ignore_errors=True)
            found = f"after {self.limit:g} s {'; '.join(reasons) or 'it is not complete'}"
            raise _not_written(save.final, found, "look into its disk, or raise $timeout_seconds;")
        if reasons:
            if self.is_first:
                shutil.rmtree(save.partial, ignore_errors=True)
            raise _not_written(save.final, "; ".join(reasons))

    # ---------------------------------------------------------------- what is written, and from where

    def _plan_for(self, tensors: dict[str, Tensor | Part]) -> WritePlan:
        """What this rank writes: planned again only when tensors have changed on any rank."""
        now = signature(tensors)
        changed = torch.tensor(int(self._plan is None or now != self._signature))
        dist.all_reduce(changed, dist.ReduceOp.MAX)
        if self._plan is None or changed.item():
            self._release()
            self._plan, self._signature = plan_writing(tensors), now
        return self._plan

    def _copy(self, plan: WritePlan, tensors: dict[str, Tensor | Part], device: torch.device) -> None:
        """Copy what this rank writes."""
        if self._staging is None:
            self._staging = Staging(plan, device)
        self._staging.fill(tensors)
        if self._process is None or not self._process.alive:
            self._process = FileProcess(self._staging.descriptor, plan.pieces)

    def _write_copy(self, path: Path) -> FileSums:
        assert self._process is not None
        return self._process.write(path)

    def _release(self) -> None:
        if self._process is not None:
            self._process.close()
        if self._staging is not None:
            self._staging.close()
        self._process = self._staging = None

    def _abandon(self) -> None:
        """Leave memory and process to a write that does not end."""
        if self._process is not None:
            self._process.kill()
        self._process = self._staging = None


def _not_written(
    final: Path, reason: str, remedy: str = "make room, or give access, and", what: str = "checkpoint"
) -> NotWrittenError:
    return NotWrittenError(
        f"{what} {final} could not be written ({reason}): {remedy} the same command goes on from the checkpoint "
        "before it"
    )


def _write_tensors(path: Path, plan: WritePlan, tensors: dict[str, Tensor | Part]) -> FileSums:
    """Write a rank's file from the tensors themselves."""

    def values(name: str, offsets: Sizes) -> memoryview:
        block = Part.of(tensors[name]).block(offsets)
        return block.cpu().contiguous().flatten().view(torch.uint8).numpy().data

    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    return write_pieces(descriptor, ((piece, values(*block)) for block, piece in zip(plan.blocks, plan.pieces)))
