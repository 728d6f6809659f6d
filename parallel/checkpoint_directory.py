# SPDX-License-Identifier: Apache-2.0
"""The directory of a run's checkpoints: which of them take their names, and which go."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from parallel.checkpoint import whole_checkpoints
from parallel.whole_files import sync_to_disk


@dataclass(frozen=True)
class CheckpointDirectory:
    """Where checkpoints are; what is here is called by one rank.

    Attributes:
        keep: how many to keep; 0 keeps all.
        keep_every: checkpoints of steps that this divides are kept for good; 0 for none.
    """

    root: Path
    keep: int
    keep_every: int

    def prepare(self) -> None:
        """Make the directory, and remove what an interrupted run left there."""
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in self.root.glob("step_*.partial"):
            discard(leftover)

    def commit(self, partial: Path, final: Path, protected: frozenset[int]) -> None:
        """Give a checkpoint its name, and delete the oldest that are neither kept nor of ``protected`` steps."""
        if os.path.lexists(final):
            self._remove(final)
        partial.rename(final)
        sync_to_disk(self.root)
        if not self.keep:
            return
        # The one just written stays, even beside later ones that a run resumed from an earlier step has left behind.
        others = [
            path
            for step, path in whole_checkpoints(self.root).items()
            if path != final and step not in protected and not (self.keep_every and step % self.keep_every == 0)
        ]
        for old in others[: max(0, len(others) - self.keep + 1)]:
            self._remove(old)

    @staticmethod
    def _remove(path: Path) -> None:
        """Delete under another name, so that a crash on the way leaves nothing that passes for a whole checkpoint."""
        old = path.with_name(path.name + ".old.partial")
        discard(old)
        discard(path.rename(old))


def discard(path: Path) -> None:
    """Remove a directory with all that is in it, or whatever else has the name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
