# SPDX-License-Identifier: Apache-2.0
"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

Grade = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        grade: ok; warning, a run works but badly or might not; failed, a run will not work.
        check: what was looked at.
        text: what was found and, unless it is ok, what to do.
    """

    grade: Grade
    check: str
    text: str

    def __str__(self) -> str:
        return f"{self.grade:<8}{self.check:<14}{self.text}"


ok, warning, failed = partial(Finding, "ok"), partial(Finding, "warning"), partial(Finding, "failed")
