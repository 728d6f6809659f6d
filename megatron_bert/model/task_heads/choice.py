# SPDX-License-Identifier: Apache-2.0
"""Which of several continuations is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from megatron_bert.model.task_heads.kind import HeadKind

if TYPE_CHECKING:
    from megatron_bert.model.batch import TaskBatch


class ChoiceKind(HeadKind):
    """Pooler and one score for the first token of each choice. Labels: int64 ``[U]``, the number of the choice."""

    name = "choice"
    title = "choices"
    class_ending = "ForMultipleChoice"
    outputs = 1
    by_sequence = True
    pooled = True
    grouped = True

    def distributions(self, logits: Tensor, batch: TaskBatch) -> list[Tensor]:
        """Over the choices of an instance."""
        return [batch.by_instance(logits.squeeze(1))]

    def of_instance(self, logits: np.ndarray) -> np.ndarray:
        """The score of each choice."""
        return logits[:, 0]
