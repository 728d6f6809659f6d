# SPDX-License-Identifier: Apache-2.0
"""The model of a fine-tuning task: the encoder and one small head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megatron_bert.model.batch import TaskBatch
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.heads import Pooler
from megatron_bert.model.stage import EncoderStage
from megatron_bert.model.task_heads.table import HEADS
from parallel.dropout import fold_in


class BertForTask(EncoderStage):
    """An encoder with the head of a task, or the part of it on one pipeline stage.

    Parameters have the names they have in pretraining checkpoints and in the public classes. What RoBERTa and I-BERT
    have of their own, beside the place of the norms, follows from ``config.like_roberta``: positions, and a head of two
    layers on sequences in place of pooler and classifier.

    Args:
        config: sizes of the encoder.
        kind: of the head, in the table.
        outputs: width of the head.
        **options: as of EncoderStage.
    """

    def __init__(self, config: MegatronBertConfig, kind: str, outputs: int, **options: Any) -> None:
        self.kind, self.head_kind, self.outputs = kind, HEADS[kind], outputs
        super().__init__(config, **options)

    def make_head(self) -> None:
        """Make the head, and perhaps the pooler, under the name it has in pretraining checkpoints."""
        config, size = self.config, self.config.hidden_size
        self.pair_head: nn.ModuleDict | None = None
        if self.head_kind.has_pooler(like_roberta=config.like_roberta):
            self.pair_head = nn.ModuleDict({"pooler": Pooler(size, size, init_std=config.initializer_range)})
        self.add_module(self.head_kind.module, self.head_kind.build(config, self.outputs))

    @property
    def output_name(self) -> str:
        """Name of the layer whose rows are the head's outputs."""
        return self.head_kind.layers(like_roberta=self.config.like_roberta)[-1]

    def forward(self, batch: TaskBatch, dropout_seed: int | None = None, received: Tensor | None = None) -> Tensor:
        """Logits of the batch's rows, ``[R, outputs]``, or what the next stage goes on with; see BertForPretraining."""
        dropout_keys = self.dropout_keys(batch, dropout_seed)
        features = self.encode(batch, dropout_keys, received)
        if not self.part.last:
            return features
        if self.pair_head is not None:
            features = self.pair_head["pooler"](features)
        if dropout_keys is not None:
            # The number after those that the layers fold in, so that its mask is independent of theirs.
            dropout_keys = fold_in(dropout_keys.index_select(0, batch.rows), 1 + self.config.num_hidden_layers)
        head = self.get_submodule(self.head_kind.module)
        return self.head_kind.logits(head, features, dropout_keys, self.config)
