# SPDX-License-Identifier: Apache-2.0
"""One process at a time owns a run directory, on one machine and on several that share a file system.

The owner is named in a lock file, whose modification time it renews while it lives. A process on the same machine is
looked up; one on another machine counts as gone when its lock has not been renewed for a while, by the clock of the
file system. Neither needs locks of the file system, which network file systems may not have.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from parallel.errors import UserError
from parallel.hosts import host_name, process_runs, process_start
from parallel.object_collectives import on_first_rank
from parallel.whole_files import reporting

LOCK_FILE = "run.lock"
#: Seconds between two renewals, and without one before an owner on another machine counts as gone.
RENEWAL_SECONDS, STALE_SECONDS = 10.0, 90.0
#: Seconds to wait for an owner that may be about to end: any on this machine, and one of the same launcher or job.
GRACE_SECONDS, RESTART_SECONDS = 3.0, 30.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process named in a lock file.

    Attributes:
        token: of this lock alone.
        machine: boot and process namespace in which the pid means this process; None where the system does not say.
        started: when the process started, in clock ticks since the boot; None where the system does not say.
        launcher: pid of its parent, if that is a launcher.
        launch: name of the torchrun launch and how often it has restarted its processes.
        job: number of the Slurm job and how often it was requeued.
    """

    token: str = ""
    host: str = ""
    pid: int = 0
    machine: str | None = None
    started: int | None = None
    launcher: int | None = None
    launch: tuple[str, int] | None = None
    job: tuple[str, int] | None = None

    @classmethod
    def this_process(cls) -> Owner:
        """This process, with a new token."""
        launched = "RANK" in os.environ
        return cls(
            token=uuid.uuid4().hex,
            host=host_name(),
            pid=os.getpid(),
            machine=_machine(),
            started=process_start(os.getpid()),
            launcher=os.getppid() if launched else None,
            launch=_launch(),
            job=_numbered("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
        )

    @classmethod
    def from_json(cls, text: str) -> Owner:
        """What a lock file says; an owner without a token where it is damaged, or being written."""
        try:
            return _OWNER.validate_json(text)
        except ValueError:
            return cls()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.token else "an unknown process"

    def restarted_as(self, mine: Owner) -> bool:
        """Whether the same launcher or Slurm job started both processes, and so ends the one before the other."""
        same_job = self.job is not None and mine.job is not None and self.job[0] == mine.job[0]
        return same_job or (self.launcher is not None and self.launcher == mine.launcher)

    def known_alive(self, mine: Owner) -> bool | None:
        """Whether the process runs, as far as the process ``mine`` can tell without waiting; None for unknown."""
        if not self.token:
            return None
        # A new start by Slurm, or by torchrun, begins when all processes of the one before it have been ended, or when
        # their node is lost: if they go on there all the same, they must not keep it out.
        for before, now in ((self.job, mine.job), (self.launch, mine.launch)):
            if before is not None and now is not None and before[0] == now[0] and before[1] < now[1]:
                return False
        if self.machine is not None and self.machine == mine.machine:
            return process_runs(self.pid, self.started)
        return None


_OWNER = TypeAdapter(Owner)


def _numbered(name: str, count: str) -> tuple[str, int] | None:
    found, number = os.environ.get(name, ""), os.environ.get(count, "0")
    return (found, int(number)) if found not in ("", "none") and number.isdecimal() else None


def _launch() -> tuple[str, int] | None:
    """The torchrun launch. Others may have its name, but not in the same Slurm job, or where the same ranks meet."""
    found = _numbered("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    if found is None:
        return None
    place = os.environ.get("SLURM_JOB_ID") or f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return f"{found[0]} {place}", found[1]


def _machine() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _writing_to(run_dir: Path) -> AbstractContextManager[None]:
    return reporting("written to", f"training.run_dir {run_dir}", "give another directory")


def check_run_dir(run_dir: Path) -> None:
    """Refuse a directory that a run could not own, for it cannot be made or written to. Nothing is left there.

    Raises:
        UserError: as :meth:`RunLock.acquire`.
    """
    with _writing_to(run_dir):
        writes = run_dir / LOCK_FILE
        while not _is_there(writes.parent):
            writes = writes.parent
        if not writes.parent.is_dir():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(writes.parent))
        try:
            with tempfile.TemporaryFile(dir=writes.parent):
                pass
        except OSError as error:
            error.filename = str(writes)  # what a run makes first
            raise


def _is_there(path: Path) -> bool:
    """Whether a path is there, if only as a link to nowhere; what cannot be looked at is an error."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


class RunLock:
    """The lock of a run directory. Only rank 0 acquires it; on other ranks every method does nothing.

    Args:
        run_dir: the directory, made if it is not there.
        patience: seconds to wait at most to find out whether an owner on another machine is gone.
    """

    def __init__(self, run_dir: Path, patience: float = STALE_SECONDS) -> None:
        self.run_dir, self.path, self.patience = run_dir, run_dir / LOCK_FILE, patience
        #: Who has taken the lock over from this process; None while nobody has.
        self.taken_by: Owner | None = None
        self._mine: Owner | None = None
        self._made_directory = False
        self._ended = threading.Event()
        self._renewing: threading.Thread | None = None

    def acquire(self) -> None:
        """Become the owner.

        Raises:
            UserError: another process owns the directory, or it cannot be written to.
        """
        mine = Owner.this_process()
        with _writing_to(self.run_dir):
            self._made_directory = not self.run_dir.exists()
            self.run_dir.mkdir(parents=True, exist_ok=True)
            watch = _Watch(self.path, mine, self.patience)
            while not self._create(mine):
                watch.wait()
        self._mine = mine
        self._renewing = threading.Thread(target=self._renew, name="run lock", daemon=True)
        self._renewing.start()

    def verify(self) -> None:
        """Make sure that this process still is the owner, before it writes.

        Raises:
            UserError: another process has taken the directory over.
        """
        self._look()
        self.refuse_if_taken()

    def refuse_if_taken(self) -> None:
        """Stop if another process is known to have taken the directory over.

        Raises:
            UserError: it has.
        """
        if self.taken_by is not None:
            raise UserError(
                f"training.run_dir {self.run_dir} was taken over by {self.taken_by}, which found no sign of this "
                "process: stopped without writing anything more; the other one goes on from the newest checkpoint"
            )

    def release(self) -> None:
        """Let others own the directory."""
        if self._mine is None:
            return
        self._ended.set()
        if self._renewing is not None:
            self._renewing.join(RENEWAL_SECONDS)
        with suppress(OSError):
            if _read(self.path) == self._mine:
                self.path.unlink()
            if self._made_directory:
                self.run_dir.rmdir()  # only if nothing came of it
        self._mine = None

    def _create(self, mine: Owner) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(f"{_OWNER.dump_json(mine).decode()}\n")
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                self.path.unlink()
            raise
        return True

    def _renew(self) -> None:
        while not self._ended.wait(RENEWAL_SECONDS):
            self._look()

    def _look(self) -> None:
        """Renew the lock, or find out that it is another's."""
        mine = self._mine
        if mine is None:
            return
        with suppress(OSError):  # what a file system cannot say now proves nothing
            found = _read(self.path)
            if found is None:
                self._create(mine)  # removed by hand
            elif found == mine:
                os.utime(self.path)
            elif found.token:
                self.taken_by = found


class _Watch:
    """What a process that waits for a lock has seen of its owner."""

    def __init__(self, path: Path, mine: Owner, patience: float) -> None:
        self.path, self.mine, self.patience = path, mine, patience
        self.began = time.monotonic()
        self.owner: Owner | None = None
        self.renewed = 0.0
        self.said = False

    def wait(self) -> None:
        """Wait a moment for the owner to end; remove the lock of one that is gone.

        Raises:
            UserError: the owner is alive, or it takes too long to tell.
        """
        try:
            owner, renewed = _read(self.path), self.path.stat().st_mtime
        except FileNotFoundError:
            owner = None
        if owner is None:
            return  # released just now
        if owner != self.owner:
            self.owner, self.renewed, self.began = owner, renewed, time.monotonic()
        waited = time.monotonic() - self.began
        alive = owner.known_alive(self.mine)
        if alive is None:
            if renewed != self.renewed:
                raise self._refusal("")
            silent = max(waited, self._now() - renewed)
            if silent > STALE_SECONDS:
                alive = False
            elif waited > self.patience:
                raise self._refusal(f", or try again in {STALE_SECONDS - silent:.0f} seconds if it is gone")
            else:
                self._say(f"{owner} may still train in {self.path.parent}, last heard of {silent:.0f} seconds ago")
        if alive is False:
            _remove(self.path, owner)
            return
        if alive and waited > min(self.patience, RESTART_SECONDS if owner.restarted_as(self.mine) else GRACE_SECONDS):
            raise self._refusal("")
        time.sleep(_POLL_SECONDS)

    def _refusal(self, more: str) -> UserError:
        return UserError(
            f"training.run_dir is {self.path.parent}, where {self.owner} is training: wait for it or stop it{more}; or "
            "set another training.run_dir"
        )

    def _say(self, text: str) -> None:
        if not self.said:
            print(f"waiting: {text}", flush=True)
        self.said = True

    def _now(self) -> float:
        """The time by the clock of the file system."""
        own = self.path.with_name(f".{LOCK_FILE}.{self.mine.token}.clock")
        try:
            own.write_text("", encoding="utf-8")
            return own.stat().st_mtime
        finally:
            own.unlink(missing_ok=True)


def _read(path: Path) -> Owner | None:
    """The owner; None where there is no lock. Opening a file asks a network file system for what is new of it."""
    try:
        return Owner.from_json(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return None


def _remove(path: Path, gone: Owner) -> None:
    """Remove the lock of an owner that is gone, but not one that another process has made in the meantime."""
    aside = path.with_name(f".{LOCK_FILE}.{uuid.uuid4().hex}.stale")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside) != gone:
        with suppress(OSError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)


@contextmanager
def owning(run_dir: Path, timeout_seconds: float) -> Iterator[RunLock]:
    """Own a run directory while the block lasts; every rank calls.

    Args:
        timeout_seconds: how long ranks wait for each other.

    Raises:
        UserError: another process owns it, or it cannot be written to.
    """
    lock = RunLock(run_dir, patience=min(STALE_SECONDS, timeout_seconds / 2))
    on_first_rank(lock.acquire)
    try:
        yield lock
    finally:
        lock.release()
