# SPDX-License-Identifier: Apache-2.0
"""The MegatronBERT classes with a classification head: sentence pairs, sequences, choices, tokens and answer spans.

Shapes: B sequences, S tokens of each.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import (
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
)

from megatron_bert.family.arguments import shared_arguments
from megatron_bert.family.bert import MegatronBertHeadModel
from megatron_bert.family.classifiers import (
    ChoiceClassifier,
    Classifier,
    SequenceClassifier,
    SpanClassifier,
    TokenClassifier,
)
from megatron_bert.family.encoder import HeadModel
from megatron_bert.family.parts import without_values


class MegatronBertForNextSentencePrediction(MegatronBertHeadModel, Classifier):
    """Whether the second sentence follows the first: logits ``[B, 2]``, 0 says it does."""

    head = "cls.seq_relationship"
    drops = False

    def build(self, **parts: Any) -> None:
        """Make the modules."""
        HeadModel.build(self, **parts)
        self.cls = nn.ModuleDict({"seq_relationship": without_values(nn.Linear, self.sizes.hidden_size, 2)})

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
    ) -> NextSentencePredictorOutput | tuple[Tensor, ...]:
        """Classify pairs; ``labels`` int64 ``[B]``: 0 if the second sentence follows, 1 if it is another."""
        encoded, logits = self.classified(shared_arguments(locals()))
        loss = None if labels is None else self.class_loss("labels", encoded, logits, labels)
        return self.finished(NextSentencePredictorOutput(loss=loss, logits=logits), encoded, return_dict)


class MegatronBertForSequenceClassification(MegatronBertHeadModel, SequenceClassifier):
    """A class, several labels, or values for each sequence: logits ``[B, num_labels]``."""


class MegatronBertForMultipleChoice(MegatronBertHeadModel, ChoiceClassifier):
    """Which of several continuations is right: logits ``[B, choices]``."""

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
    ) -> MultipleChoiceModelOutput | tuple[Tensor, ...]:
        """Choose; inputs are ``[B, choices, S]`` (embeddings ``[B, choices, S, H]``), ``labels`` int64 ``[B]``."""
        return self.chosen(shared_arguments(locals()), labels, return_dict)


class MegatronBertForTokenClassification(MegatronBertHeadModel, TokenClassifier):
    """A class for each token: logits ``[B, S, num_labels]``."""


class MegatronBertForQuestionAnswering(MegatronBertHeadModel, SpanClassifier):
    """Where an answer starts and ends: logits ``[B, S]`` each."""
