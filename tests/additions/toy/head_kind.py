# SPDX-License-Identifier: Apache-2.0
"""A kind of head: one of the tokens of a sequence."""

import numpy as np
from torch import Tensor

from megatron_bert.model.batch import TaskBatch
from megatron_bert.model.task_heads.kind import HeadKind


class PointerKind(HeadKind):
    """A score for every token. Labels: int64 ``[U]``, the number of the right row of an instance."""

    name = "pointer"
    title = "a token of a text"
    class_ending = "ForPointing"
    module = "pointer"
    outputs = 1

    def distributions(self, logits: Tensor, batch: TaskBatch) -> list[Tensor]:
        """Over the tokens of a sequence."""
        return [batch.by_instance(logits.squeeze(1))]

    def of_instance(self, logits: np.ndarray) -> np.ndarray:
        """The score of each token."""
        return logits[:, 0]
