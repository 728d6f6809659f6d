"""Writing checkpoints: sharded, atomic, in the background if asked; and what is done when the file system refuses."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from io import IOBase
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem

from parallel.checkpoint import HAS_MANIFEST, STATE_FILE, checkpoint_step
from parallel.errors import UserError
from parallel.hosts import host_name
from parallel.manifest import MANIFEST_FILE, SummingFile, write_manifest, write_sums
from parallel.process_group import new_group
from parallel.whole_files import reason_of, sync_directory

#: Seconds by which a thread that waits for others outlasts the limit: who does not write is named by itself before.
_MARGIN_SECONDS = 60.0


class NotWrittenError(UserError):
    """The file system refuses a checkpoint; those before it are there still."""


class CheckpointWriter:
    """Writes the checkpoints of a run, in the background if asked, and keeps the newest.

    Every rank constructs it at the same point and calls :meth:`save` and :meth:`finish` at the same steps. What the
    file system refuses any rank is raised on all of them, and nothing of that checkpoint stays; those before it do. So
    it is with a file system that does not answer for too long, whose ranks are named.

    Args:
        root: directory of the checkpoints.
        keep: how many to keep; 0 keeps all.
        asynchronous: return from :meth:`save` when the tensors are copied, and write while training goes on.
        timeout_seconds: how long a checkpoint may take to write.

    Attributes:
        protected: step whose checkpoint those saved from now on leave beside the newest ones; None for none.

    Raises:
        NotWrittenError: the directory cannot be made.
    """

    def __init__(self, root: Path, *, keep: int, asynchronous: bool, timeout_seconds: float = 1800.0) -> None:
        self.root, self.keep, self.asynchronous, self.limit = root, keep, asynchronous, timeout_seconds
        self.group = self._new_group()
        self.is_first = dist.get_rank() == 0
        self.protected: int | None = None
        self._pending: _Save | None = None
        self._on_first(root, self._prepare)

    def _new_group(self) -> dist.ProcessGroup:
        """A group of its own: the background thread's collectives must not interleave with those of training."""
        return new_group(backend="gloo", timeout_seconds=self.limit + _MARGIN_SECONDS)

    def _prepare(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in self.root.glob("step_*.partial"):
            _discard(leftover)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Save tensors by global name, and a JSON-able state, as the checkpoint of a step.

        An earlier save still being written is finished first. Returns the directory the checkpoint will have.

        Raises:
            NotWrittenError: this checkpoint, or the one before it, cannot be written.
        """
        self.finish()
        final = self.root / f"step_{step:08d}"
        self._on_first(final, lambda: _begin(_partial(final), state))
        writer = _Writer(_partial(final))
        writer.fs = _FileSystem()
        deadline = time.monotonic() + self.limit
        arguments: dict[str, Any] = {"storage_writer": writer, "process_group": self.group}
        if self.asynchronous:
            # Only this thread's copy of the tensors is taken now.
            written = dcp.async_save(tensors, **arguments)
            assert isinstance(written, Future)
        else:  # in a thread as well: nobody can wait for just so long for a write of their own
            written = _in_thread(lambda: dcp.save(tensors, **arguments))
        save = self._pending = _Save(final, writer, written, deadline)
        if self.is_first:
            # The coordinator's save ends after every rank's data is on disk, so its completion is the moment to give
            # the directory its name.
            protected = self.protected
            save.commit_with(lambda: self._commit(_partial(final), final, protected))
        if not self.asynchronous:
            self.finish()
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
        return self._pending is not None and self._pending.failed

    def finish(self) -> None:
        """Wait for a save in the background, and raise what went wrong in it, on every rank.

        Raises:
            NotWrittenError: the checkpoint cannot be written, or not in time.
        """
        if self._pending is None:
            return
        save, self._pending = self._pending, None
        reason, stuck = save.outcome()
        if stuck and save.writer.writing:
            reason = f"rank {dist.get_rank()} on {host_name()} has not written its part"
        outcomes: list[tuple[str | None, bool]] = [(None, False)] * dist.get_world_size()
        dist.all_gather_object(outcomes, (reason, stuck))  # in the group of the run: the other one may be in use still
        reasons = list(dict.fromkeys(reason for reason, _ in outcomes if reason))
        if any(stuck for _, stuck in outcomes):
            # Threads that wait, for the file system or for each other, keep the group that they are in.
            self.group = self._new_group()
            if save.give_up() and self.is_first:
                shutil.rmtree(_partial(save.final), ignore_errors=True)
            found = f"after {self.limit:g} s {'; '.join(reasons) or 'it is not complete'}"
            raise _not_written(save.final, found, "look into its disk, or raise checkpoint.timeout_seconds;")
        if reasons:
            raise self._given_up(save.final, "; ".join(reasons))

    def _on_first(self, final: Path, work: Callable[[], None]) -> None:
        """Let rank 0 work, and raise on every rank what the file system refuses it."""
        answer: list[str | None] = [None]
        if self.is_first:
            try:
                work()
            except OSError as error:
                answer = [_reason(error)]
        dist.broadcast_object_list(answer, group=self.group)
        if answer[0] is not None:
            raise self._given_up(final, answer[0])

    def _given_up(self, final: Path, reason: str) -> NotWrittenError:
        """Remove what there is of a checkpoint, of which no rank writes any more; the error to raise."""
        if final == self.root:
            return _not_written(final, reason, what="the directory of checkpoints")
        if self.is_first:
            shutil.rmtree(_partial(final), ignore_errors=True)
        return _not_written(final, reason)

    def _commit(self, partial: Path, final: Path, protected: int | None) -> None:
        write_manifest(partial)
        if os.path.lexists(final):
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
        old = path.with_name(path.name + ".old.partial")
        _discard(old)
        _discard(path.rename(old))


def _partial(final: Path) -> Path:
    return final.with_name(final.name + ".partial")


def _discard(path: Path) -> None:
    """Remove a directory with all that is in it, or whatever else has the name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _begin(partial: Path, state: dict[str, Any]) -> None:
    _discard(partial)
    partial.mkdir(parents=True)  # the directory of checkpoints may have been removed
    with (partial / STATE_FILE).open("w", encoding="utf-8") as file:
        json.dump(state | {HAS_MANIFEST: MANIFEST_FILE}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _reasons(error: dcp.CheckpointException) -> str:
    """What went wrong on any rank, each cause once, on one line."""
    return "; ".join(dict.fromkeys(" ".join(str(failure[0]).split()) for failure in error.failures.values()))


def _reason(error: dcp.CheckpointException | OSError) -> str:
    return _reasons(error) if isinstance(error, dcp.CheckpointException) else reason_of(error)


def _not_written(
    final: Path, reason: str, remedy: str = "make room, or give access, and", what: str = "checkpoint"
) -> NotWrittenError:
    return NotWrittenError(
        f"{what} {final} could not be written ({reason}): {remedy} the same command goes on from the checkpoint "
        "before it"
    )


def _in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Work in a thread that keeps no process from ending, on the GPU of this one."""
    done: Future[Any] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return done


class _Writer(dcp.FileSystemWriter):
    """Knows whether this rank is at its own part: all else is waiting for others."""

    writing = False

    def write_data(self, *args: Any) -> Any:
        self.writing = True
        written = super().write_data(*args)
        self.writing = False
        return written


class _Save:
    """A checkpoint that is being written.

    Args:
        final: the directory it will have.
        writer: of this rank's part.
        written: done when the parts are.
        deadline: until when that may take, by the monotonic clock.
    """

    def __init__(self, final: Path, writer: _Writer, written: Future[Any], deadline: float) -> None:
        self.final, self.writer, self.done, self.deadline = final, writer, written, deadline
        self._lock = threading.Lock()
        self._committing = self._given_up = False

    @property
    def failed(self) -> bool:
        """Whether :meth:`outcome` is there and not that it was written."""
        return self.done.exception() is not None if self.done.done() else time.monotonic() > self.deadline

    def outcome(self) -> tuple[str | None, bool]:
        """Wait until the deadline: what the file system refused, and whether it, or another rank, did not answer."""
        try:
            self.done.result(max(0.0, self.deadline - time.monotonic()))
        except (dcp.CheckpointException, OSError) as error:
            late = isinstance(error, TimeoutError) and not self.done.done()
            return (None, True) if late else (_reason(error), False)
        except RuntimeError:  # of a collective: errors of writing come as the above
            return None, True
        return None, False

    def commit_with(self, commit: Callable[[], None]) -> None:
        """Let the save end when the directory has its name.

        A future of its own: one that is done wakes who waits for it before it calls back.
        """
        committed: Future[None] = Future()

        def finish(written: Future[Any]) -> None:
            try:
                written.result()
                with self._lock:
                    self._committing = not self._given_up
                if self._committing:
                    self.writer.writing = True
                    commit()
            except BaseException as error:
                committed.set_exception(error)
            else:
                committed.set_result(None)

        written, self.done = self.done, committed
        written.add_done_callback(finish)

    def give_up(self) -> bool:
        """Keep it from taking its name; whether it cannot any more, even if its disk answers yet."""
        with self._lock:
            self._given_up = not self._committing
        return self._given_up


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
