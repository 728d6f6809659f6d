# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint of a run is the best, and when a run has stopped getting better."""

from __future__ import annotations

import math
from typing import Any


class Selection:
    """Follows a held-out score.

    Args:
        metric: name of the score; None follows nothing.
        patience: evaluations in a row without a better score that end the run; 0 never does.
        keep: how many checkpoints, those of the best scores, are kept whatever their age.
        lower_is_better: whether a lower score is the better one.

    Attributes:
        best_step: step of the best score so far; None before the first.
        best_score: that score, or its negative where lower is better.
    """

    def __init__(self, metric: str | None, patience: int = 0, keep: int = 1, *, lower_is_better: bool = False) -> None:
        self._sign = -1 if lower_is_better else 1
        self.metric, self.patience, self.keep = metric, patience, keep
        self._kept: list[tuple[float, int]] = []
        self.best_step: int | None = None
        self.best_score = -math.inf
        self._last_step, self._waited = 0, 0

    def update(self, step: int, scores: dict[str, float]) -> bool:
        """Note the scores after a step; whether they are among the best, and the checkpoint is to be kept."""
        if self.metric is None or step <= self._last_step:
            return False
        self._last_step = step
        score = self._sign * scores[self.metric]
        if score > self.best_score:
            self.best_step, self.best_score, self._waited = step, score, 0
        else:
            self._waited += 1
        if math.isnan(score):
            return False
        # Of equal scores the earlier one stays.
        self._kept = sorted([*self._kept, (score, step)], key=lambda one: (-one[0], one[1]))[: self.keep]
        return step in self.protected

    @property
    def exhausted(self) -> bool:
        """Whether the score has not improved for as long as the run is to wait."""
        return 0 < self.patience <= self._waited

    @property
    def protected(self) -> frozenset[int]:
        """Steps whose checkpoints are kept whatever their age."""
        return frozenset(step for _, step in self._kept)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; plain values that JSON can hold."""
        score = self.best_score if self.best_step is not None else None
        return {
            "best_step": self.best_step,
            "best_score": score,
            "last_step": self._last_step,
            "waited": self._waited,
            "kept": [list(one) for one in self._kept],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`."""
        self.best_step, self._last_step, self._waited = state["best_step"], state["last_step"], state["waited"]
        self.best_score = -math.inf if state["best_score"] is None else state["best_score"]
        # Before several were kept, the best one was.
        best = [] if self.best_step is None else [[self.best_score, self.best_step]]
        self._kept = [(score, step) for score, step in state.get("kept", best)][: self.keep]
