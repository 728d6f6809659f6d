# SPDX-License-Identifier: Apache-2.0
"""When checkpoints cannot be written: training goes on while the next one may succeed."""

from __future__ import annotations

from collections.abc import Callable

from megatron_bert.training.metrics import Report
from megatron_bert.training.selection import Selection
from parallel.checkpoint_writer import CheckpointWriter, NotWrittenError
from parallel.errors import UserError, called

#: Saves in the background that may fail in a row; with the last of them the run ends.
FAILED_SAVES = 3


class Saving:
    """Saves in the background that fail are warnings, as long as others follow; every rank does the same.

    A save that fails is reported after the step in which a rank learns of it, and the next one is made when it is due.
    A score that belongs to a checkpoint which is not there does not count: the best checkpoint is the one before it.
    """

    def __init__(self, checkpoints: CheckpointWriter, selection: Selection) -> None:
        self.checkpoints, self.selection = checkpoints, selection
        self.failures, self.failed = 0, False
        self._before: dict[int, dict[str, object]] = {}
        self._step = 0

    def evaluated(self, step: int, scores: dict[str, float]) -> bool:
        """Note held-out scores; whether they are among the best, and the weights are to be saved and kept."""
        before = self.selection.state()
        better = self.selection.update(step, scores)
        if better:
            self._before = {step: before}
            self.checkpoints.protected = self.selection.protected
        return better

    def save(self, step: int, write: Callable[[], None], report: Report, *, last: bool) -> None:
        """Write the checkpoint of a step.

        Args:
            write: calls the writer's ``save``.
            last: whether no other save follows: wait for it, and take no failure.

        Raises:
            UserError: it cannot be written and is the last one or not in the background, or too many have failed.
        """
        self.settle(report)
        self._step = step
        if last or not self.checkpoints.asynchronous:
            write()
            self.checkpoints.finish()
            self.failures = 0
        else:
            self._tolerated(write, report)
        self.report(report)

    def report(self, report: Report) -> None:
        """Report the checkpoints that have been written since the last call."""
        for saved in self.checkpoints.saved():
            report.checkpoint(saved)

    def settle(self, report: Report) -> None:
        """Wait for the save in the background, and report what went wrong in it.

        Raises:
            UserError: too many have failed in a row.
        """
        if self.checkpoints.pending:
            self._tolerated(self.checkpoints.finish, report)
            if not self.failed:
                self.failures = 0

    def _tolerated(self, work: Callable[[], None], report: Report) -> None:
        self.failed = False
        try:
            with called(timeout_seconds="checkpoint.timeout_seconds"):
                work()
        except NotWrittenError as error:
            self.failed = True
            self.failures += 1
            if self.failures == FAILED_SAVES:
                raise UserError(f"{error}; {FAILED_SAVES} saves in a row have failed") from None
            if (before := self._before.pop(self._step, None)) is not None:
                self.selection.load_state(before)
                self.checkpoints.protected = self.selection.protected
            report.say(f"warning: {error}; training goes on, and saves again when that is due")
