# SPDX-License-Identifier: Apache-2.0
"""What a kind of head is: its module and names, its labels and losses, and what its logits mean.

Nothing else knows kinds by name: batches, losses, scoring, distillation, files and integer engines ask the table. The
defaults are those of a dense layer on tokens with a class for each, so that a kind says where it differs. Modules,
and what losses need, are imported where they are used: an engine that serves asks the table without them.

Shapes: T tokens, R rows (tokens that the head reads), U instances (what a loss term belongs to: a sequence, or some
choices), H hidden size, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bert.model.configuration import MegatronBertConfig

if TYPE_CHECKING:
    from megatron_bert.model.batch import TaskBatch


class HeadKind:
    """A kind of head on the encoder.

    Attributes:
        name: in the table, in checkpoints and in integer plans.
        title: what it is for, in words.
        class_ending: what the names of transformers' classes with this head end in.
        results: names of the logits in what those classes return; several are the columns of the head's outputs.
        module: name of the head in checkpoints, here and in transformers.
        outputs: width of the head; None for the number of classes, whose names are those of its rows.
        by_sequence: whether it reads the first token of every sequence, or every token (that has a row).
        pooled: whether dense and tanh stand between the encoder and the outputs.
        dropout: whether there is dropout before it.
        grouped: whether an instance has several sequences, as inputs ``[B, choices, S]`` have.
        in_engines: whether integer engines run it, which have one dense layer, and the pooler before it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    class_ending: ClassVar[str]
    results: ClassVar[tuple[str, ...]] = ("logits",)
    module: ClassVar[str] = "classifier"
    outputs: ClassVar[int | None] = None
    by_sequence: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    dropout: ClassVar[bool] = True
    grouped: ClassVar[bool] = False
    in_engines: ClassVar[bool] = True

    # ---------------------------------------------------------------- parameters

    def width(self, config: MegatronBertConfig) -> int:
        """Number of outputs, C."""
        return self.outputs or config.num_labels

    def has_pooler(self, *, like_roberta: bool) -> bool:
        """Whether it reads the pooler of pretraining checkpoints; a head may have a layer of its own in its place."""
        del like_roberta
        return self.pooled

    def layers(self, *, like_roberta: bool) -> tuple[str, ...]:
        """Names of its layers, the one with the outputs last; other than dense ones need their own :meth:`tensors`."""
        del like_roberta
        return (self.module,)

    def tensors(self, config: MegatronBertConfig, outputs: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of its parameters in checkpoints: dense layers, all but the last as wide as the encoder."""
        size, layers = config.hidden_size, self.layers(like_roberta=config.like_roberta)
        found: dict[str, tuple[int, ...]] = {}
        for layer in layers:
            rows = outputs if layer == layers[-1] else size
            found |= {f"{layer}.weight": (rows, size), f"{layer}.bias": (rows,)}
        return found

    def build(self, config: MegatronBertConfig, outputs: int) -> nn.Module:
        """The module of the parameters."""
        from megatron_bert.model.heads import Dense

        return Dense(config.hidden_size, outputs, init_std=config.initializer_range)

    def logits(
        self, head: nn.Module, features: Tensor, dropout_keys: Tensor | None, config: MegatronBertConfig
    ) -> Tensor:
        """Run the head.

        Args:
            head: of :meth:`build`.
            features: ``[R, H]`` of the encoder, or of the pooler.
            dropout_keys: int64 ``[R]``, of dropout; None without.
            config: of the encoder.

        Returns:
            ``[R, C]``.
        """
        from megatron_bert.model.heads import dropped

        return head(dropped(features, dropout_keys, config) if self.dropout else features)

    # ---------------------------------------------------------------- labels and losses

    def labels(self, of_instances: Sequence[Tensor]) -> Tensor:
        """The labels of a batch from those of its instances: ``[U, ..]``, single whole numbers ``[U]``."""
        stacked = torch.stack(list(of_instances))
        single = stacked.shape[1:] == (1,) and not stacked.is_floating_point()
        return stacked.squeeze(1) if single else stacked

    def counted(self, labels: Tensor) -> Tensor:
        """Bool, one for each term of the loss: which labels are known."""
        from parallel.cross_entropy import IGNORED

        known = ~labels.isnan() if labels.is_floating_point() else labels != IGNORED
        return known.all(dim=1) if labels.dim() > 1 else known

    def label_weights(self, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """How much each label counts, 0 where there is none: what the mean of a loss divides its sum by is their sum.

        Weights of a multi-label task are those of the outcomes of one text, which counts once.
        """
        counted = self.counted(labels)
        if class_weights is None or labels.is_floating_point():
            return counted
        return counted * class_weights[labels.clamp(min=0)]

    def distributions(self, logits: Tensor, batch: TaskBatch) -> list[Tensor]:
        """Logits ``[N, C]`` of a distribution for each column of the labels; the loss is the mean of theirs."""
        del batch
        return [logits]

    def loss_sum(
        self, logits: Tensor, batch: TaskBatch, problem: str | None = None, class_weights: Tensor | None = None
    ) -> Tensor:
        """The loss summed over what has a label: cross entropy over :meth:`distributions`.

        Args:
            logits: ``[R, C]``.
            batch: the micro batch.
            problem: which of the kind's losses, where it has several.
            class_weights: float32 ``[C]``, which the terms of their labels are multiplied by, and for several labels of
                one text the terms of those that it has; None leaves all at 1.

        Returns:
            A float32 scalar.
        """
        from parallel.cross_entropy import IGNORED

        del problem
        found = self.distributions(logits.float(), batch)
        columns = batch.labels.unbind(1) if batch.labels.dim() > 1 else [batch.labels]
        terms = [
            F.cross_entropy(one, labels, class_weights, ignore_index=IGNORED, reduction="sum")
            for one, labels in zip(found, columns, strict=True)
        ]
        return torch.stack(terms).sum() / len(terms)

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
        """How far logits are from a teacher's, summed over what has a label, as the loss is.

        The Kullback-Leibler divergence of the distributions at a temperature T, times T^2, so that its gradient does
        not depend on T (Hinton et al., arXiv 1503.02531, section 2).

        Args:
            logits, teacher: ``[R, C]``.
            batch, problem, class_weights: as for :meth:`loss_sum`.
            temperature: T.

        Returns:
            A float32 scalar.
        """
        del problem
        weights = self.label_weights(batch.labels, class_weights)
        pairs = zip(self.distributions(logits.float(), batch), self.distributions(teacher.float(), batch), strict=True)
        terms = []
        for pair in pairs:
            mine, theirs = (torch.log_softmax(one / temperature, dim=1) for one in pair)
            terms.append(temperature**2 * (divergence(mine, theirs) * weights).sum())
        return torch.stack(terms).sum() / len(terms)

    # ---------------------------------------------------------------- logits

    def of_instance(self, logits: np.ndarray) -> np.ndarray:
        """What a task gets of the logits of one instance, ``[rows of the instance, C]``."""
        return logits


def divergence(mine: Tensor, theirs: Tensor) -> Tensor:
    """Kullback-Leibler's of log probabilities over the last dimension; places that neither has (-inf) add nothing."""
    gap = torch.where(theirs == -torch.inf, 0.0, theirs - mine)
    return (theirs.exp() * gap).sum(dim=-1)
