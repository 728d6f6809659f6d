"""What a finished run has found, and which of several runs is the best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from parallel.errors import UserError

#: What a run writes last of all, and a command of several runs beside them.
RESULTS_FILE = "results.json"


def read_results(run_dir: Path) -> dict[str, Any] | None:
    """The results of a finished run; None of any other."""
    path = run_dir / RESULTS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def best_run(directory: Path) -> Path | None:
    """The best of several runs of one command, by their summary; None where the directory does not hold several.

    Raises:
        UserError: the summary is damaged, or names no best run.
    """
    try:
        results = read_results(directory) or {}
        runs, best = list(results.get("runs", ())), results.get("best")
        best = directory / best["name"] if best else None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{directory / RESULTS_FILE} is damaged ({error}): give the directory of one run") from None
    if runs and best is None:
        raise UserError(f"{directory} holds several runs, and no best one: give one of {', '.join(runs)} in it")
    return best if runs else None
