# SPDX-License-Identifier: Apache-2.0
"""The I-BERT classes with a head: masked words, sequences, choices, tokens and answer spans.

Shapes: B sequences, S tokens of each, H hidden size, N rows.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
)

from megatron_bert.family.arguments import shared_arguments
from megatron_bert.family.classification import ChoiceClassifier, SequenceClassifier, SpanClassifier, TokenClassifier
from megatron_bert.family.encoder import Encoded
from megatron_bert.family.language import LanguageModel
from megatron_bert.family.modules import LanguageHead, RobertaLanguageHead, RobertaSequenceHead
from megatron_bert.ibert.family.encoder import IBertHeadModel


class IBertForMaskedLM(IBertHeadModel, LanguageModel):
    """Logits over the vocabulary for every token; arguments as of IBertModel."""

    _tied_weights_keys: ClassVar = {
        "lm_head.decoder.weight": "ibert.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }

    def build(self, **parts: Any) -> None:
        """Make the modules."""
        super().build(**parts)
        self.lm_head = RobertaLanguageHead(self.sizes, self.config.hidden_act, self.tp)

    def language_head(self) -> LanguageHead:
        """The masked-language head."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Predict words; ``labels`` int64 ``[B, S]`` holds the true ids, -100 where nothing is to be predicted."""
        return self.predicted(shared_arguments(locals()), labels, return_dict)


class IBertForSequenceClassification(IBertHeadModel, SequenceClassifier):
    """A class, several labels, or values for each sequence: logits ``[B, num_labels]`` from its first token."""

    pooled, drops = False, False

    def head_module(self) -> RobertaSequenceHead:
        """Two layers, in place of a pooler."""
        return RobertaSequenceHead(self.sizes)

    def vectors(self, encoded: Encoded) -> Tensor:
        """The first token's hidden state, ``[B, H]``."""
        return encoded.hidden.index_select(0, encoded.first)

    def scores(self, features: Tensor, dropout_keys: Tensor | None) -> Tensor:
        """The head: ``[B, H]`` to ``[B, num_labels]``."""
        return self.classifier(features, dropout_keys)


class IBertForMultipleChoice(IBertHeadModel, ChoiceClassifier):
    """Which of several continuations is right: logits ``[B, choices]``."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MultipleChoiceModelOutput | tuple[Tensor, ...]:
        """Choose; inputs are ``[B, choices, S]`` (embeddings ``[B, choices, S, H]``), ``labels`` int64 ``[B]``.

        The places of ``token_type_ids``, ``attention_mask`` and ``labels`` are others than in the other classes.
        """
        return self.chosen(shared_arguments(locals()), labels, return_dict)


class IBertForTokenClassification(IBertHeadModel, TokenClassifier):
    """A class for each token: logits ``[B, S, num_labels]``."""


class IBertForQuestionAnswering(IBertHeadModel, SpanClassifier):
    """Where an answer starts and ends: logits ``[B, S]`` each."""
