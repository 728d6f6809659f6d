"""Which checkpoint of a run is the best, and when a run has stopped getting better."""

from __future__ import annotations

import math
from typing import Any


class Selection:
    """Follows a held-out score, of which higher is better.

    Args:
        metric: name of the score; None follows nothing.
        patience: evaluations in a row without a better score that end the run; 0 never does.

    Attributes:
        best_step: step of the best score so far; None before the first.
        best_score: that score.
    """

    def __init__(self, metric: str | None, patience: int = 0) -> None:
        self.metric, self.patience = metric, patience
        self.best_step: int | None = None
        self.best_score = -math.inf
        self._last_step, self._waited = 0, 0

    def update(self, step: int, scores: dict[str, float]) -> bool:
        """Note the scores after a step; whether they are the best so far."""
        if self.metric is None or step <= self._last_step:
            return False
        self._last_step = step
        if scores[self.metric] > self.best_score:
            self.best_step, self.best_score, self._waited = step, scores[self.metric], 0
            return True
        self._waited += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether the score has not improved for as long as the run is to wait."""
        return 0 < self.patience <= self._waited

    @property
    def protected(self) -> frozenset[int]:
        """Steps whose checkpoints are kept whatever their age."""
        return frozenset() if self.best_step is None else frozenset({self.best_step})

    def state(self) -> dict[str, Any]:
        """For a checkpoint; plain values that JSON can hold."""
        score = self.best_score if self.best_step is not None else None
        return {"best_step": self.best_step, "best_score": score, "last_step": self._last_step, "waited": self._waited}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`."""
        self.best_step, self._last_step, self._waited = state["best_step"], state["last_step"], state["waited"]
        self.best_score = -math.inf if state["best_score"] is None else state["best_score"]
