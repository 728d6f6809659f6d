# SPDX-License-Identifier: Apache-2.0
"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Grade = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        check: what was looked at.
        grade: ok; warning, a run works but badly or might not; failed, a run will not work.
        text: what was found and, unless it is ok, what to do.
    """

    check: str
    grade: Grade
    text: str

    def __str__(self) -> str:
        return f"{self.grade:<8}{self.check:<14}{self.text}"


def ok(check: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding(check, "ok", text)


def warning(check: str, text: str) -> Finding:
    """Worth a look."""
    return Finding(check, "warning", text)


def failed(check: str, text: str) -> Finding:
    """Must be fixed first."""
    return Finding(check, "failed", text)
