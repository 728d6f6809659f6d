# SPDX-License-Identifier: Apache-2.0
"""The model of a fine-tuning task: the encoder and one small head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_bert.model.batch import TokenBatch
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.encoder import BertEmbeddings, Encoder
from megatron_bert.model.heads import Dense, Pooler, SequenceHead, dropped
from parallel.dropout import fold_in
from parallel.layers import select_tokens
from parallel.mesh import SINGLE, TensorParallel
from parallel.pipeline.stage import StagePart
from parallel.recompute import Recompute

#: On the first token of each sequence (``choice``: one score each), on tokens, or on tokens without dropout.
HeadKind = Literal["sequence", "choice", "token", "span"]


@dataclass(frozen=True, kw_only=True)
class TaskBatch(TokenBatch):
    """Sequences with what a task asks of them. Units are what a loss term belongs to: a sequence, or some choices.

    Attributes:
        rows: int64 ``[R]``, indices on the token axis of the tokens whose logits are asked for, unit by unit.
        owners: int64 ``[R]``, the unit each row belongs to, 0 to U - 1.
        places: int64 ``[R]``, its number among the rows of its unit.
        widest: most rows of a unit.
        labels: int64 or float32; by kind of head ``[U]``, ``[U, C]``, ``[R]`` or, for spans, ``[U, 2]``.
        taught: ``[R, outputs]``, what a teacher says of the rows; None without one, and before the last stage.
    """

    rows: Tensor
    owners: Tensor
    places: Tensor
    widest: int
    labels: Tensor
    taught: Tensor | None = None

    def by_unit(self, values: Tensor) -> Tensor:
        """Scores of the rows, ``[R]``, as ``[U, widest]`` with -inf where a unit has fewer rows."""
        units = len(self.labels)
        table = values.new_full((units * self.widest,), -torch.inf)
        return table.index_copy(0, self.owners * self.widest + self.places, values).view(units, self.widest)


class PooledToken(nn.Module):
    """Dense and tanh on the first token of a sequence, under the name it has in pretraining checkpoints.

    Args:
        config: sizes of the encoder.
        device: of the parameters.
    """

    def __init__(self, config: MegatronBertConfig, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        size = config.hidden_size
        self.pooler = Pooler(size, size, init_std=config.initializer_range, device=device)

    def forward(self, first_tokens: Tensor) -> Tensor:
        """``[N, H]`` to the same."""
        return self.pooler(first_tokens)


class BertForTask(nn.Module):
    """An encoder with the head of a task, or the part of it on one pipeline stage.

    Parameters have the names they have in pretraining checkpoints and in the public classes. What RoBERTa and I-BERT
    have of their own, beside the place of the norms, follows from ``config.like_roberta``: positions, and a head of two
    layers on sequences in place of pooler and classifier.

    Args:
        config: sizes of the encoder.
        kind: of the head.
        outputs: width of the head.
        tp: the tensor-parallel handle.
        part: the stage's part; the whole model by default.
        recompute: what layers compute again in the backward pass.
        device: of the parameters; they hold no values until :func:`parallel.sharding.initialize` or a checkpoint
            gives them.
    """

    def __init__(
        self,
        config: MegatronBertConfig,
        kind: HeadKind,
        outputs: int,
        *,
        tp: TensorParallel = SINGLE,
        part: StagePart | None = None,
        recompute: Recompute = "none",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        part = part or StagePart(range(config.num_hidden_layers), first=True, last=True)
        self.config, self.tp, self.part, self.kind = config, tp, part, kind
        self.embeddings = BertEmbeddings(config, tp=tp, device=device) if part.first else None
        self.encoder = Encoder(config, tp=tp, layers=part.layers, recompute=recompute, device=device)
        two_layers = kind == "sequence" and config.like_roberta
        pooled = kind in ("sequence", "choice") and not two_layers
        self.pair_head = PooledToken(config, device=device) if part.last and pooled else None
        if part.last:
            head: nn.Module
            if two_layers:
                head = SequenceHead(config, outputs, device=device)
            else:
                head = Dense(config.hidden_size, outputs, init_std=config.initializer_range, device=device)
            self.add_module(self.head_name, head)

    @property
    def head_name(self) -> str:
        """Name of the head's module."""
        return "qa_outputs" if self.kind == "span" else "classifier"

    @property
    def output_name(self) -> str:
        """Name of the layer whose rows are the head's outputs."""
        return f"{self.head_name}.out_proj" if self.kind == "sequence" and self.config.like_roberta else self.head_name

    @property
    def word_embeddings(self) -> nn.Parameter | None:
        """The word embeddings on the first stage, None elsewhere."""
        return None if self.embeddings is None else self.embeddings.word_embeddings.weight

    def forward(self, batch: TaskBatch, dropout_seed: int | None = None, received: Tensor | None = None) -> Tensor:
        """Logits of the batch's rows, or what the next stage goes on with.

        Args:
            batch: what to read; every stage takes the whole of it.
            dropout_seed: seed of the run's dropout masks; None switches dropout off.
            received: hidden states from the stage before, ``[T, H]`` or this rank's ``[T/t, H]`` under sequence
                parallelism; None on the first stage.

        Returns:
            ``[R, outputs]`` on the last stage, hidden states like ``received`` on others.
        """
        keys = None if dropout_seed is None else batch.dropout_keys(dropout_seed)
        if self.embeddings is not None:
            hidden = self.embeddings(batch.tokens, batch.positions + self.config.first_position, batch.types, keys)
        else:
            assert received is not None, "a stage that is not the first goes on from hidden states"
            hidden = received
        hidden = self.encoder(hidden, batch.layout, keys)
        if not self.part.last:
            return hidden
        features = select_tokens(hidden, batch.rows, self.tp)
        if self.pair_head is not None:
            features = self.pair_head(features)
        if keys is not None:
            # The number after those that the layers fold in, so that its mask is independent of theirs.
            keys = fold_in(keys.index_select(0, batch.rows), 1 + self.config.num_hidden_layers)
        head = self.get_submodule(self.head_name)
        if isinstance(head, SequenceHead):
            return head(features, keys)
        return head(features if self.kind == "span" else dropped(features, keys, self.config))
