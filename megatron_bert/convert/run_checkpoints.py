# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a run: step, layout, size, and whether they are whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bert.json_file import section
from parallel.checkpoint import check_checkpoint, read_state
from parallel.errors import DamagedCheckpointError, UserError

FOLDER = "checkpoints"
#: Files that every run writes when it begins, by which it is known.
RUN_FILES = ("metrics.jsonl", "heartbeat.json", "run.lock")
#: Folders that a run writes, and may read again when it goes on.
RUN_FOLDERS = (FOLDER, "tokenizer", "model", "tensorboard", "traces", "profile", "diverged", "logs", "wandb", "mlruns")


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of a run.

    Attributes:
        step: after which it was written; None where that is unknown.
        size: in bytes.
        fault: what is wrong with it; None for a whole one.
        checked: how far it was looked at.
    """

    path: Path
    step: int | None
    layout: str
    size: int
    fault: str | None
    checked: str

    @property
    def set_aside(self) -> bool:
        """Whether a run has found it damaged, and given it another name."""
        return ".damaged" in self.path.name


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is called a checkpoint of a run, whole or set aside."""
    return path.is_dir() and path.name.startswith("step_") and not path.name.endswith(".partial")


def run_of(place: Path) -> Path | None:
    """The run that a path belongs to: its directory, one of its folders or anything below; None for all others.

    Args:
        place: absolute; it need not be there.
    """
    owned = (folder.parent for folder in (place, *place.parents) if folder.name in RUN_FOLDERS)
    return next((run for run in (place, *owned) if any((run / name).is_file() for name in RUN_FILES)), None)


def list_checkpoints(run: Path, *, verify: bool) -> list[RunCheckpoint]:
    """The checkpoints of a run directory, or the one that the path is, oldest first; none for anything else.

    Args:
        run: a run directory or a checkpoint.
        verify: read everything and compare it with the checksums, not only names and sizes.
    """
    if is_checkpoint(run):
        return [_look(run, verify)]
    folder = run / FOLDER
    return [_look(path, verify) for path in sorted(folder.iterdir()) if is_checkpoint(path)] if folder.is_dir() else []


def _look(path: Path, verify: bool) -> RunCheckpoint:
    fault, checked = None, "every byte has its checksum" if verify else "names and sizes of files are right"
    try:
        if check_checkpoint(path, everything=verify) is None:
            checked = "without checksums, of an older version"
    except DamagedCheckpointError as error:
        fault = error.fault
    except OSError as error:
        fault = str(error)
    state: dict[str, Any] = {}
    try:
        state = read_state(path)
    except UserError as error:
        fault = fault or str(error)
    step = state.get("step")
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    parallel, layout = section(state, "settings", "parallel"), "unknown"
    if parallel:
        layout = (
            f"tensor {parallel.get('tensor')} x pipeline {parallel.get('pipeline')} x data {state.get('data_size')}"
        )
    return RunCheckpoint(path, step if isinstance(step, int) else None, layout, size, fault, checked)


def as_table(checkpoints: list[RunCheckpoint]) -> str:
    """A line for each checkpoint, the oldest first."""
    rows = [("checkpoint", "step", "layout", "bytes", "state")]
    for found in checkpoints:
        state = f"whole ({found.checked})" if found.fault is None else f"damaged: {found.fault}"
        if found.set_aside:
            state = f"set aside as damaged{'' if found.fault is None else f': {found.fault}'}"
        step = "?" if found.step is None else str(found.step)
        rows.append((found.path.name, step, found.layout, f"{found.size:,}", state))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join([*(text.ljust(w) for text, w in zip(row, widths)), row[-1]]) for row in rows)
