# SPDX-License-Identifier: Apache-2.0
"""Number formats of a run, and the loss scale float16 needs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_bert.config_sections import PrecisionSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Steps that float16 may skip in a row while the loss scale is 1; it takes 16 to get there from 65536.
MOST_SKIPPED = 20


class LossScale:
    """Keeps float16 gradients in range; a constant 1 for other formats.

    The loss is multiplied by the scale and the gradients divided by it. A step whose gradients overflow is skipped and
    halves the scale (not below 1); a run of clean steps doubles it (Micikevicius et al., arXiv 1710.03740, section
    3.2).
    """

    def __init__(self, settings: PrecisionSettings) -> None:
        self.dynamic = settings.compute == "float16"
        self.value = settings.initial_loss_scale if self.dynamic else 1.0
        self.interval = settings.loss_scale_growth_interval
        self.clean_steps = self.skipped_steps = 0

    @property
    def exhausted(self) -> bool:
        """Whether so many steps in a row were skipped, and the scale is so small, that the scale is not the cause."""
        return self.value == 1.0 and self.skipped_steps >= MOST_SKIPPED

    def overflowed(self, norm: Tensor) -> bool:
        """Whether a step is skipped for the norm of its gradient; a dynamic scale waits for the device to know."""
        return self.dynamic and not math.isfinite(norm.item())

    def update(self, overflow: bool) -> None:
        """Take note of a step."""
        if not self.dynamic:
            return
        if overflow:
            self.value, self.clean_steps = max(1.0, self.value / 2), 0
            self.skipped_steps += 1
            return
        self.skipped_steps = 0
        self.clean_steps += 1
        if self.clean_steps == self.interval:
            self.value, self.clean_steps = self.value * 2, 0

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"value": self.value, "clean_steps": self.clean_steps, "skipped_steps": self.skipped_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`; without effect on formats that need no scale."""
        if self.dynamic:
            self.value, self.clean_steps = float(state["value"]), int(state["clean_steps"])
            self.skipped_steps = int(state.get("skipped_steps", 0))
