# SPDX-License-Identifier: Apache-2.0
"""Jumps of the loss, after which a run can return to its last checkpoint and leave out the data it jumped on."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from megatron_bert.config import TrainingSettings
from megatron_bert.config_sections import RunTrainingSettings
from megatron_bert.training.metrics import Report
from megatron_bert.training.run_state import RunState
from megatron_bert.training.saving import Saving
from parallel.checkpoint import latest_checkpoint, whole_checkpoints
from parallel.errors import UserError
from parallel.object_collectives import on_first_rank

#: Median absolute deviations times this are standard deviations, for a normal distribution.
_DEVIATIONS = 1.4826
#: The spread counts as at least this share of the median: losses of a model that has learned all hardly vary.
_LEAST_SPREAD = 0.01


class Spikes:
    """Looks for losses far above the last ones, by median and median absolute deviation, which no spike moves.

    Args:
        settings: of the run; only pretraining has any for this.
    """

    def __init__(self, settings: RunTrainingSettings) -> None:
        self.settings = settings if isinstance(settings, TrainingSettings) and settings.spike_threshold else None
        self.losses: list[float] = []
        #: Steps in a row that were above; those of a spike that may be beginning.
        self.above = 0
        self.returns = 0

    def limit(self) -> float:
        """The loss above which a step counts as part of a spike; infinite until enough steps were seen."""
        if self.settings is None or len(self.losses) < self.settings.spike_window:
            return math.inf
        median = statistics.median(self.losses)
        spread = _DEVIATIONS * statistics.median(abs(loss - median) for loss in self.losses)
        return median + self.settings.spike_threshold * max(spread, _LEAST_SPREAD * abs(median))

    def spiked(self, loss: float) -> bool:
        """Take note of the loss of a step; whether it was the last of so many that make a spike."""
        if self.settings is None or not math.isfinite(loss):  # a float16 step that was skipped
            return False
        if loss > self.limit():
            self.above += 1
            return self.above >= self.settings.spike_steps
        self.above = 0
        self.losses = [*self.losses, loss][-self.settings.spike_window :]
        return False

    def forget(self) -> None:
        """Begin again, from the losses to come."""
        self.losses, self.above = [], 0

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"losses": self.losses, "above": self.above, "returns": self.returns}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`."""
        if self.settings is not None:
            self.losses = [float(loss) for loss in state["losses"]][-self.settings.spike_window :]
            self.above, self.returns = int(state["above"]), int(state["returns"])


def go_back_after_spike(trainer: RunState, spikes: Spikes, loss: float, saving: Saving, report: Report) -> bool:
    """Whether there was a spike, and a return to the checkpoint before it and the data after it; every rank calls.

    Args:
        trainer: which may just have made the last step of a spike.
        loss: of its step.

    Raises:
        UserError: the run has done so as often as it may.
    """
    settings, step = spikes.settings, trainer.step
    if settings is None or not spikes.spiked(loss):
        return False
    spike = f"the loss rose to {loss:.4g} at step {step}, above {spikes.limit():.4g} for {spikes.above} step(s)"
    saving.settle(report)
    root, last = trainer.checkpoints.root, step - spikes.above
    path = on_first_rank(lambda: latest_checkpoint(root, last))
    if path is None:
        report.say(f"warning: {spike}, and there is no checkpoint to return to: training goes on")
        spikes.forget()
        return False
    returns, position = spikes.returns + 1, trainer.consumed_samples + trainer.skipped_samples
    if returns > settings.spike_returns:
        raise UserError(
            f"{spike}, after {settings.spike_returns} return(s) to a checkpoint: go on from {path} with a lower "
            "learning_rate.peak, look at the data, or raise training.spike_returns"
        )
    on_first_rank(lambda: _set_aside(root, last))
    trainer.resume(path)
    before = trainer.consumed_samples + trainer.skipped_samples
    trainer.skipped_samples, spikes.returns = position - trainer.consumed_samples, returns
    report.say(f"{spike}: returned to {path} without samples {before} to {position - 1}")
    row = {"spike_step": step, "spike_loss": loss, "spike_returns": returns, "skipped_samples": trainer.skipped_samples}
    report.went_back(trainer.step, row)
    return True


def _set_aside(root: Path, step: int) -> None:
    """Give checkpoints after a step another name: a run that was stopped in a spike has saved them."""
    for saved, path in whole_checkpoints(root).items():
        if saved > step:
            path.rename(path.with_name(f"{path.name}.spike"))
