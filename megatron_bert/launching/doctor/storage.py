# SPDX-License-Identifier: Apache-2.0
"""The directory that runs write to: seen by all hosts, with renames and exclusive creation that hold, and room."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from megatron_bert.launching.doctor.findings import Finding, failed, ok, warning
from parallel.hosts import host_name
from parallel.object_collectives import gather_objects, on_first_rank

#: How long a file may take to be seen by another host, in seconds.
_PATIENCE = 10.0
_WRITE_MEGABYTES = 64
#: Free space that is worth a warning, in bytes; a checkpoint of 3.9B parameters takes 47 GB.
_LITTLE_SPACE = 100 * 10**9


def check_storage(directory: Path) -> list[Finding]:
    """What the ranks find together; every rank calls, and all return the same.

    Args:
        directory: made if it is not there, and left as it was but for that.
    """
    place = directory / f".doctor-{on_first_rank(lambda: uuid.uuid4().hex)}"
    problem = on_first_rank(lambda: _prepare(place))
    if problem is not None:
        return [failed("files", problem)]
    try:
        return [*_shared(place), *_semantics(place), *on_first_rank(lambda: _room(directory, place))]
    finally:
        dist.barrier()
        on_first_rank(lambda: shutil.rmtree(place, ignore_errors=True))


def _prepare(place: Path) -> str | None:
    try:
        place.mkdir(parents=True)
        (place / "first").write_text("1")
    except OSError as error:
        return f"{place.parent} cannot be written by {host_name()} ({error.strerror}): choose another with --dir"
    return None


def _seen(path: Path) -> float | None:
    """Seconds until a path is there; None if it never is."""
    began = time.monotonic()
    while not path.exists():
        if time.monotonic() - began > _PATIENCE:
            return None
        time.sleep(0.01)
    return time.monotonic() - began


def _hosts_where(found: bool) -> str:
    """Hosts of the ranks that have found something, as text; every rank calls."""
    return ", ".join(dict.fromkeys(filter(None, gather_objects(host_name() if found else None))))


def _shared(place: Path) -> list[Finding]:
    """Whether a file of the first rank is seen by all."""
    delay = _seen(place / "first")
    blind, hosts = _hosts_where(delay is None), _hosts_where(True)
    slowest = max(gather_objects(delay or 0.0))
    if blind:
        return [
            failed(
                "files",
                f"{place.parent} is not shared: {blind} do not see what another host writes there; choose a "
                "directory on a shared file system with --dir, and put runs and data there",
            )
        ]
    if "," not in hosts:
        return [ok("files", f"{place.parent} can be written")]
    return [ok("files", f"{place.parent} is shared; a new file is seen after {slowest:.2f} s")]


def _semantics(place: Path) -> list[Finding]:
    """A renamed directory is whole for all, and only one of many creates a file."""
    whole = winner = False
    visible = (place / "first").exists()
    if dist.get_rank() == 0:
        partial = place / "step.partial"
        partial.mkdir()
        (partial / "state").write_text("whole")
        partial.rename(place / "step")
    if visible:
        there = _seen(place / "step") is not None and _seen(place / "step" / "state") is not None
        whole = there and (place / "step" / "state").read_text() == "whole"
    broken = _hosts_where(visible and not whole)
    if visible:
        with suppress(FileExistsError):
            os.close(os.open(place / "lock", os.O_CREAT | os.O_EXCL))
            winner = True
    winners = sum(gather_objects(winner))
    findings = []
    if broken:
        text = f"a renamed directory is not seen whole by {broken}: checkpoints there are not safe"
        findings.append(failed("files", text))
    if winners != 1:
        text = f"{winners} processes each created the same file alone: the file system's locks do not work"
        findings.append(failed("files", text))
    return findings or [ok("files", "renames and exclusive creation hold for all ranks")]


def _room(directory: Path, place: Path) -> list[Finding]:
    """Free space, and how fast one process writes and syncs."""
    block, began = os.urandom(2**20), time.monotonic()
    try:
        with (place / "block").open("wb") as file:
            for _ in range(_WRITE_MEGABYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        speed = _WRITE_MEGABYTES / 1024 / max(1e-9, time.monotonic() - began)
        written = ok("files", f"one process writes and syncs {speed:.2f} GiB/s")
    except OSError as error:
        written = failed("files", f"{_WRITE_MEGABYTES} MiB cannot be written ({error.strerror})")
    free = shutil.disk_usage(directory).free
    text = f"{free / 10**9:,.0f} GB free in {directory}"
    if free >= _LITTLE_SPACE:
        return [written, ok("space", text)]
    needed = "a checkpoint takes 12 bytes per parameter, and checkpoint.keep are kept"
    return [written, warning("space", f"{text}; {needed}")]
