# SPDX-License-Identifier: Apache-2.0
"""The directory that runs write to: seen by all hosts, with renames and exclusive creation that hold, and room."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path

import torch.distributed as dist

from megatron_bert.launching.doctor.findings import Finding, failed, ok, warning
from parallel.hosts import host_name

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
    rank = dist.get_rank()
    named: list[str] = [uuid.uuid4().hex]
    dist.broadcast_object_list(named, src=0)
    place = directory / f".doctor-{named[0]}"
    problem = _prepare(place) if rank == 0 else None
    problems: list[str | None] = [problem]
    dist.broadcast_object_list(problems, src=0)
    if problems[0] is not None:
        return [failed("files", problems[0])]
    try:
        return [*_shared(place), *_semantics(place), *_room(directory, place)]
    finally:
        dist.barrier()
        if rank == 0:
            shutil.rmtree(place, ignore_errors=True)


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


def _everyone(value: object) -> list[object]:
    values: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _hosts_of(flags: list[object]) -> str:
    """Hosts of the ranks whose flag is set."""
    return ", ".join(dict.fromkeys(str(flag) for flag in flags if flag))


def _shared(place: Path) -> list[Finding]:
    """Whether a file of the first rank is seen by all."""
    delay = _seen(place / "first")
    blind = _everyone(host_name() if delay is None else None)
    slowest = max(_everyone(delay or 0.0), key=lambda value: float(str(value)))
    if any(blind):
        return [
            failed(
                "files",
                f"{place.parent} is not shared: {_hosts_of(blind)} do not see what another host writes there; choose a "
                "directory on a shared file system with --dir, and put runs and data there",
            )
        ]
    if len(set(_everyone(host_name()))) == 1:
        return [ok("files", f"{place.parent} can be written")]
    return [ok("files", f"{place.parent} is shared; a new file is seen after {float(str(slowest)):.2f} s")]


def _semantics(place: Path) -> list[Finding]:
    """A renamed directory is whole for all, and only one of many creates a file."""
    rank = dist.get_rank()
    if not (place / "first").exists():
        _everyone(None)
        _everyone(None)
        return []
    if rank == 0:
        partial = place / "step.partial"
        partial.mkdir()
        (partial / "state").write_text("whole")
        partial.rename(place / "step")
    whole = _seen(place / "step") is not None and _seen(place / "step" / "state") is not None
    broken = _everyone(None if whole and (place / "step" / "state").read_text() == "whole" else host_name())
    try:
        os.close(os.open(place / "lock", os.O_CREAT | os.O_EXCL))
        winner = True
    except FileExistsError:
        winner = False
    winners = sum(bool(value) for value in _everyone(winner))
    findings = []
    if any(broken):
        text = f"a renamed directory is not seen whole by {_hosts_of(broken)}: checkpoints there are not safe"
        findings.append(failed("files", text))
    if winners != 1:
        text = f"{winners} processes each created the same file alone: the file system's locks do not work"
        findings.append(failed("files", text))
    return findings or [ok("files", "renames and exclusive creation hold for all ranks")]


def _room(directory: Path, place: Path) -> list[Finding]:
    """Free space, and how fast one rank writes and syncs."""
    found: list[Finding | None] = [None, None]
    if dist.get_rank() == 0:
        block = os.urandom(2**20)
        began = time.monotonic()
        try:
            with (place / "block").open("wb") as file:
                for _ in range(_WRITE_MEGABYTES):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            speed = _WRITE_MEGABYTES / 1024 / max(1e-9, time.monotonic() - began)
            found[0] = ok("files", f"one process writes and syncs {speed:.2f} GiB/s")
        except OSError as error:
            found[0] = failed("files", f"{_WRITE_MEGABYTES} MiB cannot be written ({error.strerror})")
        free = shutil.disk_usage(directory).free
        grade = warning if free < _LITTLE_SPACE else ok
        more = (
            "" if free >= _LITTLE_SPACE else "; a checkpoint takes 12 bytes per parameter, and checkpoint.keep are kept"
        )
        found[1] = grade("space", f"{free / 10**9:,.0f} GB free in {directory}{more}")
    dist.broadcast_object_list(found, src=0)
    return [finding for finding in found if finding is not None]
