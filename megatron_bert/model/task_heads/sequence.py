# SPDX-License-Identifier: Apache-2.0
"""Classes, several labels, or values of sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.task_heads.kind import HeadKind, divergence

if TYPE_CHECKING:
    from megatron_bert.model.batch import TaskBatch


class SequenceKind(HeadKind):
    """Pooler and a dense layer on the first token; RoBERTa has a head of two layers instead.

    Labels: int64 ``[U]`` of one class each, float32 ``[U, C]`` of 0 and 1 (several labels) or of values (regression).
    """

    name = "sequence"
    title = "sequences"
    class_ending = "ForSequenceClassification"
    by_sequence = True
    pooled = True

    def has_pooler(self, *, like_roberta: bool) -> bool:
        """RoBERTa's head has a layer of its own in place of the pooler."""
        return not like_roberta

    def layers(self, *, like_roberta: bool) -> tuple[str, ...]:
        """The classifier, or RoBERTa's two layers."""
        return ("classifier.dense", "classifier.out_proj") if like_roberta else ("classifier",)

    def build(self, config: MegatronBertConfig, outputs: int) -> nn.Module:
        """The module."""
        if config.like_roberta:
            from megatron_bert.model.heads import SequenceHead

            return SequenceHead(config, outputs)
        return super().build(config, outputs)

    def logits(
        self, head: nn.Module, features: Tensor, dropout_keys: Tensor | None, config: MegatronBertConfig
    ) -> Tensor:
        """Run the head; RoBERTa's has dropout inside too."""
        return (
            head(features, dropout_keys)
            if config.like_roberta
            else super().logits(head, features, dropout_keys, config)
        )

    def loss_sum(
        self, logits: Tensor, batch: TaskBatch, problem: str | None = None, class_weights: Tensor | None = None
    ) -> Tensor:
        """Cross entropy of single labels, mean squared error of values, mean binary cross entropy of several labels."""
        if not batch.labels.is_floating_point():
            return super().loss_sum(logits, batch, problem, class_weights)
        logits, counted = logits.float(), self.counted(batch.labels)
        targets = batch.labels.where(counted[:, None], torch.zeros_like(batch.labels))
        if problem == "regression":
            each = F.mse_loss(logits, targets, reduction="none")
        else:
            each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=class_weights)
        return (each.mean(dim=1) * counted).sum()

    def distillation_sum(
        self,
        logits: Tensor,
        teacher: Tensor,
        batch: TaskBatch,
        problem: str | None = None,
        *,
        temperature: float,
        class_weights: Tensor | None = None,
    ) -> Tensor:
        """Of several labels the divergence of each label's two outcomes, averaged; of values the squared difference."""
        if not batch.labels.is_floating_point():
            return super().distillation_sum(
                logits, teacher, batch, problem, temperature=temperature, class_weights=class_weights
            )
        logits, teacher, counted = logits.float(), teacher.float(), self.counted(batch.labels)
        if problem == "regression":
            return ((logits - teacher).square().mean(dim=1) * counted).sum()
        pairs = [
            torch.stack((F.logsigmoid(x / temperature), F.logsigmoid(-x / temperature)), 2) for x in (logits, teacher)
        ]
        return temperature**2 * (divergence(*pairs).mean(dim=1) * counted).sum()

    def of_instance(self, logits: np.ndarray) -> np.ndarray:
        """``[C]`` of the only row."""
        return logits[0]
