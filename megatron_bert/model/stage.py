# SPDX-License-Identifier: Apache-2.0
"""A model, or the part of it on one pipeline stage: what all of them share."""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from megatron_bert.model.batch import TokenBatch, token_keys
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.encoder import BertEmbeddings, Encoder, WordTable
from parallel.layers import select_tokens
from parallel.mesh import SINGLE, TensorParallel
from parallel.pipeline.stage import StagePart
from parallel.recompute import Recompute


class ModelStage(nn.Module):
    """What a pipeline runs (:class:`parallel.pipeline.stage.Stage`), of a model with a configuration."""

    def __init__(
        self, config: MegatronBertConfig, *, tp: TensorParallel = SINGLE, part: StagePart | None = None
    ) -> None:
        super().__init__()
        self.config, self.tp = config, tp
        self.part = part or StagePart(range(config.num_hidden_layers), first=True, last=True)


class EncoderStage(ModelStage):
    """The embeddings and layers of a stage; subclasses add the heads.

    Args:
        config: sizes of the encoder.
        tp: the tensor-parallel handle.
        part: the stage's part; the whole model by default.
        recompute: what layers compute again in the backward pass.
        device: of the parameters; they hold no values until :func:`parallel.sharding.initialize` or a checkpoint
            gives them.
    """

    #: Whether the last stage has a copy of the word embeddings, for its head.
    tied: ClassVar[bool] = False

    def __init__(
        self,
        config: MegatronBertConfig,
        *,
        tp: TensorParallel = SINGLE,
        part: StagePart | None = None,
        recompute: Recompute = "none",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, tp=tp, part=part)
        self._token_keys = token_keys
        self.embeddings: WordTable | None = None
        with nullcontext() if device is None else torch.device(device):
            if self.part.first:
                self.embeddings = BertEmbeddings(config, tp=tp)
                self.embeddings.word_embeddings.tied = self.tied and self.part.last
            elif self.part.last and self.tied:
                self.embeddings = WordTable(config, tp=tp)
            self.encoder = Encoder(config, tp=tp, layers=self.part.layers, recompute=recompute)
            if self.part.last:
                self.make_head()

    def make_head(self) -> None:
        """Make the modules of the last stage beyond the layers."""

    def compile_forward(self, *, everything: bool) -> None:
        """Compile each layer, before data parallelism wraps it.

        Args:
            everything: the embeddings, the dropout keys and the heads as well.
        """
        for layer in self.encoder.layer_list():
            layer.compile_forward()
        if everything:
            self.encoder.compile_keys()
            self._token_keys = torch.compile(token_keys, fullgraph=True)
            if isinstance(self.embeddings, BertEmbeddings):
                self.embeddings.compile_forward()

    @property
    def word_embeddings(self) -> nn.Parameter | None:
        """This stage's copy of the word embeddings; None where it has none."""
        return None if self.embeddings is None else self.embeddings.word_embeddings.weight

    def dropout_keys(self, batch: TokenBatch, seed: int | None) -> Tensor | None:
        """The dropout keys of a batch, int64 ``[T]``; None without a seed."""
        return None if seed is None else self._token_keys(batch.samples, batch.positions, seed)

    def encode(self, batch: TokenBatch, dropout_keys: Tensor | None, received: Tensor | None) -> Tensor:
        """Hidden states after the stage's layers.

        Args:
            batch: what to read; every stage takes the whole of it.
            dropout_keys: int64 ``[T]`` dropout keys of the tokens; None without dropout.
            received: hidden states from the stage before; None on the first stage.

        Returns:
            ``[T, H]``, or this rank's ``[T/t, H]`` under sequence parallelism; on the last stage ``[R, H]``, of the
            tokens that the heads read, on every tensor rank.
        """
        if isinstance(self.embeddings, BertEmbeddings):
            hidden = self.embeddings(
                batch.tokens, batch.positions + self.config.first_position, batch.types, dropout_keys
            )
        else:
            assert received is not None, "a stage that is not the first goes on from hidden states"
            hidden = received
        if not self.part.last:
            return self.encoder(hidden, batch.layout, dropout_keys)
        if self.encoder.selects(hidden) and (rows := batch.read_by_heads()).shape[0] < hidden.shape[0]:
            return self.encoder(hidden, batch.layout, dropout_keys, rows=rows)
        last = self.encoder(hidden, batch.layout, dropout_keys)
        return select_tokens(last, batch.read_by_heads(), self.tp)
