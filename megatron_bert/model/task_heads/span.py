# SPDX-License-Identifier: Apache-2.0
"""Where an answer starts and ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from megatron_bert.model.task_heads.kind import HeadKind

if TYPE_CHECKING:
    from megatron_bert.model.batch import TaskBatch


class SpanKind(HeadKind):
    """A dense layer on tokens, without dropout. Labels: int64 ``[U, 2]``, numbers among the rows of the instance.

    The loss is the mean of the start's and the end's, each over the tokens of the sequence.
    """

    name = "span"
    title = "answers in a text"
    class_ending = "ForQuestionAnswering"
    results = ("start_logits", "end_logits")
    module = "qa_outputs"
    outputs = 2
    dropout = False

    def distributions(self, logits: Tensor, batch: TaskBatch) -> list[Tensor]:
        """Over the tokens of a sequence: of the start and of the end."""
        return [batch.by_instance(column) for column in logits.unbind(1)]
