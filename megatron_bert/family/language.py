# SPDX-License-Identifier: Apache-2.0
"""Classes with a language-model head over the vocabulary: pretraining and masked words.

Shapes: B sequences, S tokens of each, T tokens without skipped padding, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.megatron_bert.modeling_megatron_bert import MegatronBertForPreTrainingOutput

from megatron_bert.family.arguments import Arguments, check_labels, shared_arguments
from megatron_bert.family.bert import MegatronBertHeadModel
from megatron_bert.family.checks import checked_switch
from megatron_bert.family.configuration import MegatronBertConfig
from megatron_bert.family.encoder import Encoded, HeadModel
from megatron_bert.family.losses import blanked, mean_cross_entropy
from megatron_bert.family.modules import LanguageHead, Predictions
from megatron_bert.family.parts import without_values
from parallel.collectives import gather_from_ranks
from parallel.cross_entropy import IGNORED, vocab_parallel_cross_entropy
from parallel.errors import UserError
from parallel.recording import values_unknown

#: How many tokens' logits are computed at once where they are written part by part.
_CPU_ROWS, _ACCELERATOR_ROWS = 128, 1 << 13


class LanguageModel(HeadModel):
    """The encoder and a head over the vocabulary, whose output matrix is the word embeddings or one of its own."""

    pooled = False

    def hidden_logits(self, hidden: Tensor) -> Tensor:
        """This rank's part of the logits of hidden states ``[N, H]``."""
        head = self.language_head()
        assert head is not None, "a language model has a language-model head"
        return head(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[N, H]`` to logits ``[N, V]`` on every rank."""
        local = gather_from_ranks(self.hidden_logits(hidden), self.tp)
        return local if self.tp.size == 1 else local[:, : self.config.vocab_size]

    def token_logits(self, encoded: Encoded) -> Tensor:
        """Logits ``[B, S, V]`` of every token; 0 where padding was skipped.

        They are far larger than all that they are computed from. Where nothing is kept for gradients they are written
        part by part into their places, so that no second copy of them is made.
        """
        if encoded.kept is None or torch.is_grad_enabled():
            return encoded.rectangle(self.logits(encoded.hidden))
        rows = _CPU_ROWS if encoded.hidden.device.type == "cpu" else _ACCELERATOR_ROWS
        places = encoded.batch * encoded.length
        whole: Tensor | None = None
        for hidden, kept in zip(encoded.hidden.split(rows), encoded.kept.split(rows), strict=True):
            part = self.logits(hidden)
            if whole is None:
                whole = part.new_empty((places, part.shape[1]))
            whole.index_copy_(0, kept, part)
        assert whole is not None, "padding is skipped where every sequence has a token"
        skipped = torch.ones(places, dtype=torch.bool, device=whole.device).index_fill_(0, encoded.kept, 0)
        return whole.index_fill_(0, skipped.nonzero().squeeze(1), 0.0).unflatten(0, (encoded.batch, encoded.length))

    def language_loss(self, hidden: Tensor, labels: Tensor, items: float | None = None) -> Tensor:
        """Mean cross entropy over the labeled tokens; 0 if there are none, whatever the hidden states hold.

        The head runs again on these few rows, so that the backward pass costs what they cost and not what all cost.

        Args:
            hidden: ``[N, H]``.
            labels: int64 ``[N]``; -100 is ignored.
            items: what the sum of the losses is divided by; the number of labeled tokens by default.

        Raises:
            UserError: ``items`` is 0, but there are labeled tokens.
        """
        if values_unknown():  # how many tokens have labels is not known
            local = self.hidden_logits(hidden)
            losses = vocab_parallel_cross_entropy(local, labels.long(), self.config.vocab_size, self.tp)
            return losses.sum() / ((labels != IGNORED).sum().clamp(min=1) if items is None else items)
        rows = (labels != IGNORED).nonzero().squeeze(1)
        count = rows.numel()
        if items == 0 and count:
            raise UserError(
                f"num_items_in_batch is 0, but {count} words have labels: count them and those of all batches"
            )
        if count == 0:
            # A row whose label is ignored: all parameters get a gradient of 0, which data parallelism waits for.
            selected, labels = blanked(hidden[:1]), labels[:1]
        else:
            selected, labels = hidden.index_select(0, rows.to(hidden.device)), labels.index_select(0, rows)
        local = self.hidden_logits(selected)
        labels = labels.to(local.device, torch.int64)
        losses = vocab_parallel_cross_entropy(local, labels, self.config.vocab_size, self.tp)
        return losses.sum() / (items or max(1, count))

    def encoded(self, given: Arguments, labels: Tensor | None) -> Encoded:
        """Run the encoder, without a cache, and with every token that has a label."""
        shown, needed = not self.learns_from(labels), self.labeled(given, labels)
        return self.base_model.encode(replace(given, use_cache=False), shown=shown, needed=needed)

    def masked_loss(self, encoded: Encoded, labels: Tensor | None) -> Tensor | None:
        """The loss of masked words, where there are ``labels`` ``[B, S]``."""
        return None if labels is None else self.language_loss(encoded.hidden, encoded.of_tokens(labels))

    def labeled(self, given: Arguments, labels: Tensor | None) -> Tensor | None:
        """Check word labels, and say which tokens have one: bool ``[B, S]``."""
        if labels is None or given.shape is None:
            return None
        check_labels("labels", labels, given.shape, self.config.vocab_size, IGNORED)
        return labels != IGNORED

    def predicted(
        self, given: Arguments, labels: Tensor | None, return_dict: bool | None
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Logits over the vocabulary, and the loss where there are ``labels`` ``[B, S]``."""
        encoded = self.encoded(given, labels)
        output = MaskedLMOutput(
            loss=self.masked_loss(encoded, labels),
            logits=self.token_logits(encoded),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return self.returned(output, return_dict)


class MegatronBertLanguageModel(MegatronBertHeadModel, LanguageModel):
    """A language model with MegatronBERT's head."""

    _tied_weights_keys: ClassVar = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def build(self, **parts: Any) -> None:
        """Make the modules."""
        super().build(**parts)
        self.cls: Any = nn.ModuleDict({"predictions": Predictions(self.sizes, self.config.hidden_act, self.tp)})

    def language_head(self) -> LanguageHead:
        """The masked-language head."""
        return self.cls.predictions


class MegatronBertForMaskedLM(MegatronBertLanguageModel):
    """Logits over the vocabulary for every token; arguments as of MegatronBertModel."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Predict words; ``labels`` int64 ``[B, S]`` holds the true ids, -100 where nothing is to be predicted."""
        return self.predicted(shared_arguments(locals()), labels, return_dict)


class MegatronBertForPreTraining(MegatronBertLanguageModel):
    """The two heads of pretraining: masked words and sentence pairs.

    Args:
        config: sizes and options.
        add_binary_head: whether there is a pooler and a sentence-pair head.
        **options: as of DocumentedModel.
    """

    pooled = True

    def __init__(self, config: MegatronBertConfig, add_binary_head: bool = True, **options: Any) -> None:
        super().__init__(config, pooled=checked_switch("add_binary_head", add_binary_head), **options)

    def build(self, **parts: Any) -> None:
        """Make the modules."""
        super().build(**parts)
        if parts["pooled"]:
            self.cls["seq_relationship"] = without_values(nn.Linear, self.sizes.hidden_size, 2)

    def pair_logits(self, encoded: Encoded) -> Tensor:
        """The sentence-pair head: logits ``[B, 2]``."""
        return self.cls.seq_relationship(self.base_model.pooled(encoded))

    def pair_loss(self, encoded: Encoded, pair: Tensor | None, labels: Tensor) -> Tensor:
        """The loss of the pair head; apart from ``forward``, whose locals() must hold arguments alone."""
        if pair is None:
            raise UserError("next_sentence_label is given, but there is no sentence-pair head: add_binary_head=True")
        return mean_cross_entropy("next_sentence_label", pair, labels, lambda: self.pair_logits(encoded.blank()))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MegatronBertForPreTrainingOutput | tuple[Tensor, ...]:
        """Predict words and whether the second sentence follows the first.

        ``labels`` int64 ``[B, S]`` as for masked words; ``next_sentence_label`` int64 ``[B]``, 0 if it follows, 1 if it
        is another. The loss is the sum of those whose labels are given.
        """
        encoded = self.encoded(shared_arguments(locals()), labels)
        pair = None if self.base_model.pooler is None else self.pair_logits(encoded)
        losses = [self.masked_loss(encoded, labels)]
        if next_sentence_label is not None:
            losses.append(self.pair_loss(encoded, pair, next_sentence_label))
        present = [loss for loss in losses if loss is not None]
        output = MegatronBertForPreTrainingOutput(
            loss=sum(present[1:], present[0]) if present else None,
            prediction_logits=self.token_logits(encoded),
            seq_relationship_logits=pair,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return self.returned(output, return_dict)
