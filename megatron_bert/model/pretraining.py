# SPDX-License-Identifier: Apache-2.0
"""The model that pretrains: encoder, masked-language head and sentence-pair head."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.heads import MaskedLanguageHead, SentencePairHead
from megatron_bert.model.stage import EncoderStage
from parallel.cross_entropy import IGNORED, vocab_parallel_argmax, vocab_parallel_cross_entropy
from parallel.mesh import SINGLE, TensorParallel


class PretrainingLogits(NamedTuple):
    """Logits of a micro batch.

    Attributes:
        masked: ``[K, padded_vocab/t]``, for each slot this rank's part of the vocabulary.
        pair: ``[B, 2]``, or None without a sentence-pair head.
    """

    masked: Tensor
    pair: Tensor | None


class BertForPretraining(EncoderStage):
    """Megatron BERT with its pretraining heads, or the part of it on one pipeline stage.

    Logits are computed at masked positions only. Parameters have the same global names on whatever stage they are; the
    last stage holds a second copy of the word embeddings, under the same name, as the head's output matrix. Arguments
    are those of EncoderStage.
    """

    tied = True
    masked_head: MaskedLanguageHead
    pair_head: SentencePairHead | None

    def make_head(self) -> None:
        """Make the heads."""
        self.masked_head = MaskedLanguageHead(self.config, tp=self.tp)
        self.pair_head = SentencePairHead(self.config) if self.config.binary_head else None

    def compile_forward(self, *, everything: bool) -> None:
        """Compile each layer, and with ``everything`` embeddings, dropout keys and the masked-language head."""
        super().compile_forward(everything=everything)
        if everything and self.part.last:
            self.masked_head.compile_forward()

    def forward(
        self, batch: MicroBatch, dropout_seed: int | None = None, received: Tensor | None = None
    ) -> PretrainingLogits | Tensor:
        """Logits of the masked positions and of the sentence pairs, or what the next stage goes on with.

        Args:
            batch: what to read; every stage takes the whole of it.
            dropout_seed: seed of the run's dropout masks; None switches dropout off.
            received: hidden states from the stage before, ``[T, H]`` or this rank's ``[T/t, H]`` under sequence
                parallelism; None on the first stage.

        Returns:
            Logits on the last stage, hidden states like ``received`` on others.
        """
        dropout_keys = self.dropout_keys(batch, dropout_seed)
        hidden = self.encode(batch, dropout_keys, received)
        if not self.part.last:
            return hidden
        assert self.embeddings is not None, "the last stage has the head's output matrix"
        masked, first = hidden.split((batch.slots.shape[0], batch.first_tokens.shape[0]))
        logits = self.masked_head(masked, self.embeddings.word_embeddings.weight)
        return PretrainingLogits(logits, None if self.pair_head is None else self.pair_head(first))


class LossSums(NamedTuple):
    """Sums over a micro batch, each a float32 scalar.

    Sums, not means: they are divided by the counts of the whole global batch, so that the result does not depend on
    how the batch was cut.
    """

    masked: Tensor
    pair: Tensor


def loss_sums(logits: PretrainingLogits, batch: MicroBatch, vocab_size: int, tp: TensorParallel = SINGLE) -> LossSums:
    """Cross entropies of a micro batch, summed over its masked tokens and over its sentence pairs.

    In a training step, which differentiates them, they may overwrite the logits of the masked tokens.
    """
    return LossSums(*cross_entropies(logits.masked, logits.pair, batch.slot_labels, batch.pair_labels, vocab_size, tp))


def cross_entropies(
    masked: Tensor, pair: Tensor | None, slot_labels: Tensor, pair_labels: Tensor, vocab_size: int, tp: TensorParallel
) -> tuple[Tensor, Tensor]:
    """The same of tensors, as compiled code takes them."""
    total = vocab_parallel_cross_entropy(masked, slot_labels, vocab_size, tp, overwrite=True).sum()
    if pair is None:
        return total, torch.zeros_like(total)
    return total, F.cross_entropy(pair.float(), pair_labels, reduction="sum", ignore_index=IGNORED)


@torch.no_grad()
def correct_counts(
    logits: PretrainingLogits, batch: MicroBatch, vocab_size: int, tp: TensorParallel = SINGLE
) -> LossSums:
    """How many masked tokens and sentence pairs are predicted right, as float32 scalars."""
    right = vocab_parallel_argmax(logits.masked, vocab_size, tp) == batch.slot_labels
    masked = right.sum().float()
    if logits.pair is None:
        return LossSums(masked, torch.zeros_like(masked))
    return LossSums(masked, (logits.pair.argmax(dim=1) == batch.pair_labels).sum().float())
