# SPDX-License-Identifier: Apache-2.0
"""Which rank of a run failed first, and why, and whether another start can help."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bert.launching.records import RankEnd, Start, rank_file, read_starts, words_of

_SILENT = "ended silently"


def summary(folder: Path) -> str:
    """A few lines: the rank that failed first and its error, who followed, and how the starts before ended.

    Raises:
        UserError: there are no records.
    """
    *earlier, last = read_starts(folder)
    lines = [*_earlier(folder, earlier), *_last(folder, last)]
    if (final := why_final(folder)) is not None:
        lines.append(f"another start would not help: {final.reason}")
    return "\n".join(lines)


class Final(NamedTuple):
    """Why a run should not be started again.

    Attributes:
        refused: whether it was refused, and did not fail twice in the same way.
        reason: for people.
    """

    refused: bool
    reason: str


def why_final(folder: Path) -> Final | None:
    """Why another start of the run would end as the last one did; None if it may go on.

    What a user has to fix is refused again, and what fails twice in the same step with the same words in the same place
    does not depend on luck.

    Raises:
        UserError: there are no records.
    """
    *earlier, last = read_starts(folder)
    first = last.first
    if first is None or first.error is None or first.followed:
        return None
    if first.error["error"] == "UserError":
        return Final(True, "it was refused with the sentence above")
    before = earlier[-1].first if earlier else None
    if before is not None and before.error is not None and _nature(before.error) == _nature(first.error):
        return Final(False, "the start before it failed in the same way, at the same step")
    return None


def _nature(error: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(str(error.get(name)) for name in ("error", "message", "cause", "cause_message", "place", "notes"))


def _earlier(folder: Path, starts: list[Start]) -> Iterable[str]:
    for number, start in enumerate(starts, 1):
        first = start.first
        clock = _clock(min(end.start["time"] for end in start.ends))
        if first is not None:
            text = f"failed first: {_where(first)} {_describe(first).splitlines()[0]}"
        elif start.silent:
            words = next((words[0] for end in start.silent if (words := _crash(folder, end))), "")
            text = f"{_SILENT}: {_names(start.silent)}" + (f" ({words})" if words else "")
        else:
            text = "no rank failed"
        yield f"start {number} of {len(starts) + 1} at {clock}: {text}"


def _last(folder: Path, start: Start) -> list[str]:
    first, silent, failed = start.first, start.silent, start.failed
    lines = []
    if first is not None:
        lines += [f"failed first: {_where(first)} {_describe(first)}", *_same_error(first, failed)]
        lines.append(f"  its log: {rank_file(folder, first.rank, 'log')}")
    elif silent:
        lines.append(
            f"{_SILENT} (killed, out of memory, or the host is gone): {_names(silent)}; "
            "whoever was left lost the connection to them"
        )
        if (missed := next((end for end in failed if end.error and end.error.get("ranks")), None)) is not None:
            lines.append(f"  {_where(missed)} {_describe(missed).splitlines()[0]}")
        shown = next((end for end in silent if _crash(folder, end)), silent[0])
        lines.append(f"  last lines of {rank_file(folder, shown.rank, 'log')}:")
        lines += [f"    {line}" for line in words_of(folder, shown)]
    else:
        return [f"no rank of the last start failed ({len(start.ends)} ranks)"]
    followed = [end for end in failed if end.followed and end is not first]
    if followed:
        lines.append(f"lost the connection after it: {_names(followed)}")
    if first is not None and silent:
        lines.append(f"{_SILENT}: {_names(silent)}")
    return lines


def _crash(folder: Path, end: RankEnd) -> list[str]:
    words = words_of(folder, end)
    return words if words and words[0].startswith("Fatal Python error") else []


def _where(end: RankEnd) -> str:
    return f"rank {end.rank} on {end.start['host']} (process {end.start['pid']})"


def _clock(time: float) -> str:
    return datetime.fromtimestamp(time).strftime("%H:%M:%S")


def _describe(end: RankEnd) -> str:
    error = end.error
    assert error is not None
    text = f"at {_clock(error['time'])}: {error['error']}: {_one_line(error['message'])}"
    if error["cause_message"] != error["message"]:
        text += f"\n  because of {error['cause']}: {_one_line(error['cause_message'])}"
    return text + (f"\n  at {error['place']}" if error.get("place") and error["error"] != "UserError" else "")


def _same_error(first: RankEnd, failed: list[RankEnd]) -> Iterable[str]:
    """Other ranks that failed of themselves: with the same words, or with others."""
    assert first.error is not None
    words = first.error["message"]
    others = [end for end in failed if end is not first and (not end.followed or end.error["message"] == words)]  # type: ignore[index]
    same = [end for end in others if end.error is not None and end.error["message"] == words]
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
