# SPDX-License-Identifier: Apache-2.0
"""Records of how the ranks of a run started and ended, one file of JSON lines for each rank.

Ranks run on several hosts whose clocks differ, so an event has the time of the file system that holds the records,
which is the same for all.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bert.ending import Terminated
from parallel.errors import UserError
from parallel.hosts import host_name
from parallel.presence import comes_from_others, root_cause

#: Ranks of one start begin within this many seconds.
_SAME_START = 300.0
#: How a launcher that has lost a rank ends the others.
_ENDED = Terminated.__name__
#: Lines shown of what a rank wrote last.
_WORDS = 5
#: Keys of an event of each kind that readers rely on.
_KEYS: dict[str, dict[str, Any]] = {
    "started": {"size": int},
    "failed": {"error": str, "message": str, "cause": str, "cause_message": str},
    "ended": {},
}


def rank_file(folder: Path, rank: int, ending: str) -> Path:
    """The log (``log``) or the record (``jsonl``) of a rank."""
    return folder / f"rank_{rank:05d}.{ending}"


class Record:
    """The record of this process."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path, self.rank = rank_file(folder, rank, "jsonl"), rank

    def write(self, event: str, **details: Any) -> None:
        """Add an event."""
        line = {"event": event, "rank": self.rank, "host": host_name(), "pid": os.getpid(), "time": self._time()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | details) + "\n")

    def failed(self, error: BaseException) -> None:
        """Add what went wrong, where, and the first error that it came from."""
        cause = root_cause(error)
        frames = traceback.extract_tb(cause.__traceback__)
        self.write(
            "failed",
            error=type(error).__name__,
            message=str(error),
            cause=type(cause).__name__,
            cause_message=str(cause),
            place=f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else None,
            notes=[*getattr(error, "__notes__", [])],
            ranks=[*getattr(error, "ranks", [])],
        )

    def _time(self) -> float:
        try:
            self.path.touch()  # to now, by the clock of whoever keeps the file
            return self.path.stat().st_mtime
        except OSError:
            return time.time()


@dataclass(frozen=True)
class RankEnd:
    """How a rank of a start ended.

    Attributes:
        start: the record of its start.
        end: the record of its end; None when it left none.
    """

    start: dict[str, Any]
    end: dict[str, Any] | None

    @property
    def rank(self) -> int:
        """Of the run."""
        return int(self.start["rank"])

    @property
    def error(self) -> dict[str, Any] | None:
        """The record of its failure, if it failed and could say so."""
        return self.end if self.end is not None and self.end["event"] == "failed" else None

    @property
    def followed(self) -> bool:
        """Whether it failed because another rank had gone, or reports what went wrong on another."""
        error = self.error
        if error is None:
            return False
        if error.get("ranks"):
            return self.rank not in error["ranks"]
        return error["cause"] == _ENDED or comes_from_others(error["cause"], error["cause_message"])


@dataclass(frozen=True)
class Start:
    """Ranks that were started together.

    Attributes:
        ends: how each ended, by rank.
    """

    ends: list[RankEnd]

    @property
    def failed(self) -> list[RankEnd]:
        """Those that said why, first to last."""
        failed = [end for end in self.ends if end.error is not None]
        return sorted(failed, key=lambda end: end.error["time"])  # type: ignore[index]

    @property
    def silent(self) -> list[RankEnd]:
        """Those that said nothing."""
        return [end for end in self.ends if end.end is None]

    @property
    def first(self) -> RankEnd | None:
        """The rank that failed first of itself; None if none said that it did."""
        first = next((end for end in self.failed if not end.followed), None)
        return self.failed[0] if first is None and not self.silent and self.failed else first


def read_starts(folder: Path) -> list[Start]:
    """The starts that left records in a log directory, oldest first.

    Lines that are cut off or damaged are left out.

    Raises:
        UserError: there are no records.
    """
    ends: list[RankEnd] = []
    for path in sorted(folder.glob("rank_*.jsonl")):
        events = [event for line in _lines(path) if (event := _event(line)) is not None]
        for event, following in zip(events, [*events[1:], None]):
            if event["event"] == "started":
                ends.append(RankEnd(event, None if following is None or following["event"] == "started" else following))
    if not ends:
        raise UserError(f"{folder} holds no records of ranks: give the directory that {folder.name}/rank_*.log are in")
    groups: list[list[RankEnd]] = []
    for end in sorted(ends, key=lambda end: end.start["time"]):
        if groups and _belongs(end, groups[-1]):
            groups[-1].append(end)
        else:
            groups.append([end])
    return [Start(sorted(group, key=lambda end: end.rank)) for group in groups]


def _belongs(end: RankEnd, group: list[RankEnd]) -> bool:
    """Whether a rank that began after those of a group was started with them."""
    return (
        end.start["size"] == group[0].start["size"]
        and end.start["time"] - group[-1].start["time"] < _SAME_START
        and all(end.rank != other.rank for other in group)
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _event(line: str) -> dict[str, Any] | None:
    """An event, or None for a line that is not one."""
    try:
        event = json.loads(line)
        kinds = {"rank": int, "host": str, "pid": int, "time": (int, float), **_KEYS[event["event"]]}
        return event if all(isinstance(event[name], kind) for name, kind in kinds.items()) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def words_of(folder: Path, end: RankEnd) -> list[str]:
    """The last lines that a rank wrote; of a crash of native code, what it was and where Python was."""
    try:
        with rank_file(folder, end.rank, "log").open("rb") as file:
            file.seek(max(int(end.start.get("log_bytes", 0)), file.seek(0, os.SEEK_END) - 1_000_000))
            lines = file.read().decode(errors="replace").splitlines()
    except (OSError, ValueError, TypeError):
        return []
    crash = [number for number, line in enumerate(lines) if line.startswith("Fatal Python error")]
    shown = lines[crash[-1] :] if crash else lines
    shown = [line[:200] for line in shown if line.strip()]
    return shown[:_WORDS] if crash else shown[-_WORDS:]
