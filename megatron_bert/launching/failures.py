"""Which rank of a run failed first, and why, from the records that the ranks left."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_bert.launching.launched import rank_file
from parallel.errors import UserError

#: Ranks of one start begin within this many seconds; what a rank wrote long before is of an earlier start.
_SAME_START = 300.0
#: Lines of its log that are shown of a rank that left no word.
_LAST_LINES = 5
#: What torch says on a rank whose partner is gone: that is where the failure arrived, not where it began.
_FOLLOWED = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|broken pipe|socket|timed? ?out|nccl|gloo|"
    r"remote process|store|heartbeat",
    re.IGNORECASE,
)
#: What is a rank's own trouble, although torch raises it as one of the network.
_OWN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
_NETWORK_ERRORS = {"DistBackendError", "DistNetworkError", "DistStoreError"}


@dataclass(frozen=True)
class RankEnd:
    """How a rank of the last start ended.

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
        """Whether it failed because another rank had gone."""
        error = self.error
        if error is None or _OWN.search(error["cause_message"]):
            return False
        return error["cause"] in _NETWORK_ERRORS or (
            error["cause"] == "RuntimeError" and _FOLLOWED.search(error["cause_message"]) is not None
        )


def read_ends(folder: Path) -> list[RankEnd]:
    """The ranks of the last start that left records in a log directory, by rank.

    Raises:
        UserError: there are no records.
    """
    records: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("rank_*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        events = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be cut off
        if events:
            records[int(events[0]["rank"])] = events
    if not records:
        raise UserError(f"{folder} holds no records of ranks: give the directory that {folder.name}/rank_*.log are in")
    ends = [_last_start(events) for events in records.values()]
    newest = max(ends, key=lambda end: end.start["time"])
    return sorted(
        (
            end
            for end in ends
            if end.rank < newest.start["size"]
            and end.start["size"] == newest.start["size"]
            and newest.start["time"] - end.start["time"] < _SAME_START
        ),
        key=lambda end: end.rank,
    )


def _last_start(events: list[dict[str, Any]]) -> RankEnd:
    index = max(i for i, event in enumerate(events) if event["event"] == "started")
    return RankEnd(events[index], events[index + 1] if index + 1 < len(events) else None)


def summary(folder: Path) -> str:
    """A few lines: the rank that failed first and its error, then who followed.

    Raises:
        UserError: there are no records.
    """
    ends = read_ends(folder)
    failed = sorted((end for end in ends if end.error is not None), key=lambda end: end.error["time"])  # type: ignore[index]
    silent = [end for end in ends if end.end is None]
    first = next((end for end in failed if not end.followed), None)
    if first is None and not silent:
        first = failed[0] if failed else None
    lines = []
    if first is not None:
        lines += [f"failed first: {_where(first)} {_describe(first)}", *_same_error(first, failed)]
        lines.append(f"  its log: {rank_file(folder, first.rank, 'log')}")
    elif silent:
        lines.append(
            f"ended without a word (killed, out of memory, or the host is gone): {_names(silent)}; "
            "whoever was left lost the connection to them"
        )
        for end in silent[:1]:
            lines.append(f"  last lines of {rank_file(folder, end.rank, 'log')}:")
            lines += [f"    {line}" for line in _last_lines(folder, end.rank)]
    else:
        return f"no rank of the last start failed ({len(ends)} ranks)"
    followed = [end for end in failed if end.followed and end is not first]
    if followed:
        lines.append(f"lost the connection after it: {_names(followed)}")
    if first is not None and silent:
        lines.append(f"ended without a word: {_names(silent)}")
    return "\n".join(lines)


def _where(end: RankEnd) -> str:
    return f"rank {end.rank} on {end.start['host']} (process {end.start['pid']})"


def _describe(end: RankEnd) -> str:
    error = end.error
    assert error is not None
    clock = datetime.fromtimestamp(error["time"]).strftime("%H:%M:%S")
    text = f"at {clock}: {error['error']}: {_one_line(error['message'])}"
    if error["cause_message"] != error["message"]:
        text += f"\n  because of {error['cause']}: {_one_line(error['cause_message'])}"
    return text + (f"\n  at {error['place']}" if error["place"] and error["error"] != "UserError" else "")


def _same_error(first: RankEnd, failed: list[RankEnd]) -> Iterable[str]:
    """Other ranks that failed of themselves: with the same words, or with others."""
    assert first.error is not None
    others = [end for end in failed if end is not first and not end.followed]
    words = first.error["cause_message"]
    same = [end for end in others if end.error is not None and end.error["cause_message"] == words]
    different = [end for end in others if end not in same]
    if same:
        yield f"  the same error on {_names(same)}"
    for end in different[:3]:
        yield f"then failed: {_where(end)} {_describe(end)}"
    if different[3:]:
        yield f"then failed: {_names(different[3:])}"


def _names(ends: list[RankEnd]) -> str:
    """Ranks in short, with their hosts: ``ranks 0-2, 5 on n1, n2``."""
    ranks = sorted(end.rank for end in ends)
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][-1] == rank - 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    numbers = ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)
    hosts = ", ".join(sorted({end.start["host"] for end in ends}))
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers} on {hosts}"


def _one_line(text: str) -> str:
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return first if len(first) <= 300 else first[:297] + "..."


def _last_lines(folder: Path, rank: int) -> list[str]:
    try:
        text = rank_file(folder, rank, "log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line[:200] for line in text.splitlines() if line.strip()][-_LAST_LINES:]
