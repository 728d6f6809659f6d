"""Writing checkpoints: sharded, atomic, in the background if asked; and what is done when the file system refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from io import IOBase
from pathlib import Path
from typing import IO, Any, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem

from parallel.checkpoint import HAS_MANIFEST, STATE_FILE, checkpoint_step
from parallel.errors import UserError
from parallel.manifest import MANIFEST_FILE, SummingFile, write_manifest, write_sums
from parallel.process_group import new_group
from parallel.whole_files import reason_of, sync_directory


class NotWrittenError(UserError):
    """The file system refuses a checkpoint; those before it are there still."""


class CheckpointWriter:
    """Writes the checkpoints of a run, in the background if asked, and keeps the newest.

    Every rank constructs it at the same point and calls :meth:`save` and :meth:`finish` at the same steps. What the
    file system refuses any rank is raised on all of them, and nothing of that checkpoint stays; those before it do.

    Args:
        root: directory of the checkpoints.
        keep: how many to keep; 0 keeps all.
        asynchronous: return from :meth:`save` when the tensors are copied, and write while training goes on.

    Attributes:
        protected: step whose checkpoint those saved from now on leave beside the newest ones; None for none.

    Raises:
        NotWrittenError: the directory cannot be made.
    """

    def __init__(self, root: Path, *, keep: int, asynchronous: bool) -> None:
        self.root, self.keep, self.asynchronous = root, keep, asynchronous
        # A group of its own: the background thread's collectives must not interleave with those of training.
        self.group = new_group(backend="gloo")
        self.is_first = dist.get_rank() == 0
        self.protected: int | None = None
        self._pending: tuple[Path, Future[Any]] | None = None
        self._on_first(root, self._prepare)

    def _prepare(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in self.root.glob("step_*.partial"):
            shutil.rmtree(leftover)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Save tensors by global name, and a JSON-able state, as the checkpoint of a step.

        An earlier save still being written is finished first. Returns the directory the checkpoint will have.

        Raises:
            NotWrittenError: this checkpoint, or the one before it, cannot be written.
        """
        self.finish()
        final = self.root / f"step_{step:08d}"
        partial = _partial(final)
        self._on_first(final, lambda: _begin(partial, state))
        writer = dcp.FileSystemWriter(partial)
        writer.fs = _FileSystem()
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
                raise self._given_up(final, _reasons(error)) from None
            self._on_first(final, lambda: self._commit(partial, final, self.protected))
        return final

    def close(self) -> None:
        """Give up the group, after :meth:`finish`; every rank calls."""
        dist.destroy_process_group(self.group)

    @property
    def pending(self) -> bool:
        """Whether a save in the background has not been waited for."""
        return self._pending is not None

    @property
    def failed(self) -> bool:
        """Whether this rank knows already that the save in the background has failed: :meth:`finish` would raise."""
        return self._pending is not None and self._pending[1].done() and self._pending[1].exception() is not None

    def finish(self) -> None:
        """Wait for a save in the background, and raise what went wrong in it, on every rank.

        Raises:
            NotWrittenError: the checkpoint cannot be written.
        """
        if self._pending is None:
            return
        (final, pending), self._pending = self._pending, None
        try:
            pending.result()
        except (dcp.CheckpointException, OSError) as error:
            self._agree(final, _reason(error))
        else:
            self._agree(final, None)

    def _on_first(self, final: Path, work: Callable[[], None]) -> None:
        """Let rank 0 work, and raise on every rank what the file system refuses it."""
        reason = None
        if self.is_first:
            try:
                work()
            except OSError as error:
                reason = _reason(error)
        self._agree(final, reason)

    def _agree(self, final: Path, mine: str | None) -> None:
        """Raise on every rank what went wrong on any, once all are here."""
        reasons: list[str | None] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(reasons, mine, group=self.group)
        first = next((reason for reason in reasons if reason is not None), None)
        if first is not None:
            raise self._given_up(final, first)

    def _given_up(self, final: Path, reason: str) -> NotWrittenError:
        """Remove what there is of a checkpoint, of which no rank writes any more; the error to raise."""
        if self.is_first and final != self.root:
            shutil.rmtree(_partial(final), ignore_errors=True)
        what = "the directory of checkpoints" if final == self.root else "checkpoint"
        return NotWrittenError(
            f"{what} {final} could not be written ({reason}): make room, or give access, and the same command goes on "
            "from the checkpoint before it"
        )

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
        write_manifest(partial)
        if final.exists():
            self._remove(final)
        partial.rename(final)
        sync_directory(self.root)
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


def _partial(final: Path) -> Path:
    return final.with_name(final.name + ".partial")


def _begin(partial: Path, state: dict[str, Any]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with (partial / STATE_FILE).open("w", encoding="utf-8") as file:
        json.dump(state | {HAS_MANIFEST: MANIFEST_FILE}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _reasons(error: dcp.CheckpointException) -> str:
    """What went wrong on any rank, each cause once, on one line."""
    return "; ".join(dict.fromkeys(" ".join(str(failure[0]).split()) for failure in error.failures.values()))


def _reason(error: dcp.CheckpointException | OSError) -> str:
    return _reasons(error) if isinstance(error, dcp.CheckpointException) else reason_of(error)


class _FileSystem(FileSystem):
    """Files that leave their checksums for the manifest, and whose writer learns what the system refused.

    Torch's archives say no more than that something failed.
    """

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IOBase]:
        """A file that is open while the block lasts."""
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            summing = SummingFile(cast(IO[bytes], stream))
            try:
                yield summing
            except Exception as error:
                # What is left in the buffer would be an error once more.
                raise OSError(reason_of(summing.refused)) if summing.refused else error from None
        write_sums(Path(path), summing.sums())
