# SPDX-License-Identifier: Apache-2.0
"""One checkpoint that is being written, in a thread of each rank: they agree on every step of it, and on its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.checkpoint import STATE_FILE
from parallel.checkpoint_directory import CheckpointDirectory, discard
from parallel.checkpoint_plan import WritePlan
from parallel.manifest import FileSums, write_manifest
from parallel.object_collectives import gather_objects
from parallel.stored.distributed_files import METADATA
from parallel.whole_files import reason_of, write_bytes, write_text


@dataclass(frozen=True)
class SavedCheckpoint:
    """What a checkpoint cost.

    Attributes:
        stall_seconds: for which this rank's training stood still.
        seconds: from the call to the moment at which the checkpoint had its name.
        bytes: of all of its files but the manifest.
    """

    step: int
    stall_seconds: float
    seconds: float
    bytes: int


@dataclass(eq=False, kw_only=True)
class Save:
    """A checkpoint that is being written, in a thread.

    Attributes:
        group: of the threads of all ranks that write.
        limit: seconds that it may take.
        protected: steps whose checkpoints it leaves.
        saved: gets what it cost, once it has its name.
        state: content of the file beside the tensors.
        began: when, by the performance counter.
        writing: whether this rank is at its own part: all else is waiting for others.
        stall: seconds for which the caller stood still; None for all of them.
    """

    directory: CheckpointDirectory
    group: dist.ProcessGroup
    limit: float
    protected: frozenset[int]
    saved: list[SavedCheckpoint]
    step: int
    state: str
    plan: WritePlan
    began: float
    writing: bool = False
    stall: float | None = None

    def __post_init__(self) -> None:
        self.is_first = dist.get_rank() == 0
        self.final = self.directory.root / f"step_{self.step:08d}"
        self.partial = self.final.with_name(self.final.name + ".partial")
        self.deadline = time.monotonic() + self.limit
        self._copied = threading.Event()
        self._copy_end: torch.cuda.Event | None = None
        self._done: Future[None] = Future()
        self._lock = threading.Lock()
        self._committing = self._given_up = False

    def start(
        self, write: Callable[[Path], FileSums], device: torch.device, copy: Callable[[], None] = lambda: None
    ) -> None:
        """Write it in a thread that keeps no process from ending.

        Args:
            write: this rank's file.
            copy: what is done first, and waited for by :meth:`wait_for_copy`.
        """
        before = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

        def run() -> None:
            try:
                self._copy(copy, device, before)
                size = self._write(write)
                seconds = time.perf_counter() - self.began
                if size is not None:
                    stall = seconds if self.stall is None else self.stall
                    self.saved.append(SavedCheckpoint(self.step, stall, seconds, size))
                self._done.set_result(None)
            except BaseException as error:
                self._done.set_exception(error)

        threading.Thread(target=run, name="checkpoint", daemon=True).start()

    def _copy(self, copy: Callable[[], None], device: torch.device, before: torch.cuda.Event | None) -> None:
        """Copy, on a GPU in a stream of its own, behind what was queued when the save began."""
        try:
            if before is None:
                copy()
                return
            torch.cuda.set_device(device)
            stream = torch.cuda.Stream(device)
            stream.wait_event(before)
            with torch.cuda.stream(stream):
                copy()
            self._copy_end = stream.record_event()
        finally:
            self._copied.set()
        self._copy_end.synchronize()

    def wait_for_copy(self) -> None:
        """Wait until all is copied; on a GPU, let the current stream wait."""
        self._copied.wait()
        if self._copy_end is not None:
            torch.cuda.current_stream().wait_event(self._copy_end)

    @property
    def failed(self) -> bool:
        """Whether :meth:`outcome` is there and not that it was written."""
        return self._done.exception() is not None if self._done.done() else time.monotonic() > self.deadline

    def outcome(self) -> tuple[str | None, bool]:
        """Wait until the deadline: what the file system refused, and whether it, or another rank, did not answer."""
        try:
            self._done.result(max(0.0, self.deadline - time.monotonic()))
        except OSError as error:
            late = isinstance(error, TimeoutError) and not self._done.done()
            return (None, True) if late else (reason_of(error), False)
        except RuntimeError:  # of a collective: errors of writing come as the above
            return None, True
        return None, False

    def give_up(self) -> bool:
        """Keep it from taking its name; whether it cannot any more, even if its disk answers yet."""
        with self._lock:
            self._given_up = not self._committing
        return self._given_up

    def _write(self, write: Callable[[Path], FileSums]) -> int | None:
        """Write this rank's part, and give the directory its name once all ranks have written theirs; its bytes."""
        first, file = self.is_first, self.plan.file
        self._agreed(self._begin if first else lambda: None)
        parts = self._agreed(lambda: None if file is None else (file, write(self.partial / file)))
        sums = dict(part for part in parts if part is not None)
        return self._agreed((lambda: self._end(sums)) if first else lambda: None)[0]

    def _agreed(self, work: Callable[[], Any]) -> list[Any]:
        """Work, and raise on every rank what the file system refused any, once all are here; else what each found."""
        mine: tuple[str | None, Any]
        self.writing = True
        try:
            mine = None, work()
        except OSError as error:
            mine = reason_of(error), None
        self.writing = False
        found = gather_objects(mine, self.group)
        if reasons := list(dict.fromkeys(reason for reason, _ in found if reason is not None)):
            raise OSError("; ".join(reasons))
        return [one for _, one in found]

    def _begin(self) -> None:
        discard(self.partial)
        self.partial.mkdir(parents=True)  # the directory of checkpoints may have been removed
        write_text(self.partial / STATE_FILE, self.state, sync=True)

    def _end(self, sums: dict[str, FileSums]) -> int | None:
        assert self.plan.metadata is not None
        with self._lock:
            self._committing = not self._given_up
        if not self._committing:
            return None
        write_bytes(self.partial / METADATA, self.plan.metadata, sync=True)
        size = write_manifest(self.partial, sums)
        self.directory.commit(self.partial, self.final, self.protected)
        return size
