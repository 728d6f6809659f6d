"""The I-BERT classes with a head: masked words, sequences, choices, tokens and answer spans.

Shapes: B sequences, S tokens of each, H hidden size, N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_bert.family.arguments import shared_arguments
from megatron_bert.family.classifiers import ChoiceClassifier, SequenceClassifier, SpanClassifier, TokenClassifier
from megatron_bert.family.encoder import Encoded
from megatron_bert.family.language import MaskedLanguageModel
from megatron_bert.family.outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from megatron_bert.ibert.family.encoder import IBertHeadModel
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.heads import SequenceHead


class IBertForMaskedLM(IBertHeadModel, MaskedLanguageModel):
    """Logits over the vocabulary for every token; arguments as of IBertModel."""

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

    pooled = False

    def head_module(self, config: MegatronBertConfig, device: torch.device | str | None) -> nn.Module:
        """Two layers, in place of a pooler."""
        return SequenceHead(config, config.num_labels, device=device)

    def vectors(self, encoded: Encoded) -> Tensor:
        """The first token's hidden state, ``[B, H]``."""
        return encoded.hidden.index_select(0, encoded.first)

    def scores(self, features: Tensor, keys: Tensor | None) -> Tensor:
        """The head: ``[B, H]`` to ``[B, num_labels]``."""
        head: SequenceHead = getattr(self, self.head)
        return head(features, keys)

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
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Classify sequences.

        ``labels``: int64 ``[B]`` class numbers, float ``[B, num_labels]`` 0 and 1 for several labels, or float ``[B]``
        or ``[B, num_labels]`` values for a regression. ``config.problem_type`` says which; if it is None it is found
        from the labels each time: one class is a regression, whole numbers are classes, others several labels.
        """
        return self.labelled_sequences(shared_arguments(locals()), labels, return_dict)


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
    ) -> TokenClassifierOutput | tuple[Tensor, ...]:
        """Classify tokens; ``labels`` int64 ``[B, S]``, -100 where a token does not count."""
        return self.tagged(shared_arguments(locals()), labels, return_dict)


class IBertForQuestionAnswering(IBertHeadModel, SpanClassifier):
    """Where an answer starts and ends: logits ``[B, S]`` each."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[Tensor, ...]:
        """Find answers; ``start_positions`` and ``end_positions`` int64 ``[B]``, S or more where it is cut off.

        The loss is the mean of both (or the one that is given); positions beyond the tokens do not count.
        """
        return self.answered(shared_arguments(locals()), start_positions, end_positions, return_dict)
