"""Classes with a classification head: sentence pairs, sequences, choices, tokens and answer spans.

Shapes: B sequences, S tokens of each, C classes or choices.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_bert.family.arguments import Arguments
from megatron_bert.family.bert import Encoded, MegatronBertModel
from megatron_bert.family.losses import mean_cross_entropy, problem_loss
from megatron_bert.family.outputs import (
    ModelOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from megatron_bert.family.pretrained import MegatronBertPreTrainedModel
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.heads import Dense
from parallel.dropout import keyed_dropout
from parallel.errors import UserError
from parallel.mesh import SINGLE, TensorParallel


class Classifier(MegatronBertPreTrainedModel):
    """The encoder and a dense head that every tensor rank repeats.

    Args:
        config: sizes and options.
        tp, skip_padding, initial, device: as in MegatronBertModel.
    """

    #: Whether the head reads the pooled first token, or every token.
    pooled: ClassVar[bool] = True
    #: Name of the head.
    head: ClassVar[str] = "classifier"

    def __init__(
        self,
        config: MegatronBertConfig,
        *,
        tp: TensorParallel = SINGLE,
        skip_padding: bool | None = None,
        initial: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, tp, None)
        self.bert = MegatronBertModel(
            config, self.pooled, tp=tp, skip_padding=skip_padding, initial=False, device=device
        )
        size = config.hidden_size
        setattr(self, self.head, Dense(size, self.outputs(config), init_std=config.initializer_range, device=device))
        self._begin(initial)

    def outputs(self, config: MegatronBertConfig) -> int:
        """Width of the head."""
        return config.num_labels

    def dropped(self, features: Tensor, keys: Tensor | None) -> Tensor:
        """Dropout before the head, ``[N, H]`` with a key a row."""
        if keys is None:
            return features
        config = self.config
        chance = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        return keyed_dropout(features, chance, keys)

    def classified(self, given: Arguments) -> tuple[Encoded, Tensor]:
        """Run the encoder and the head: logits ``[B, C]`` of pooled tokens, or ``[T, C]`` of every token."""
        encoded = self.bert.encode(given, shown=not self.pooled)
        head: Dense = getattr(self, self.head)
        if not self.pooled:
            return encoded, head(self.dropped(encoded.hidden, encoded.keys))
        keys = None if encoded.keys is None else encoded.keys.index_select(0, encoded.first)
        return encoded, head(self.dropped(self.bert.pooled(encoded), keys))


def _finish(output: ModelOutput, encoded: Encoded) -> ModelOutput:
    return replace(output, hidden_states=encoded.hidden_states, attentions=encoded.attentions)  # type: ignore[type-var]


class MegatronBertForNextSentencePrediction(Classifier):
    """Whether the second sentence follows the first: logits ``[B, 2]``, 0 says it does."""

    head = "pair_classifier"

    def outputs(self, config: MegatronBertConfig) -> int:
        """Follows, or does not."""
        del config
        return 2

    def dropped(self, features: Tensor, keys: Tensor | None) -> Tensor:
        """No dropout here, as in pretraining."""
        del keys
        return features

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
        given = _arguments(locals())
        encoded, logits = self.classified(given)
        loss = None if labels is None else mean_cross_entropy("labels", logits, labels.reshape(-1))
        return self.returned(_finish(NextSentencePredictorOutput(loss=loss, logits=logits), encoded), return_dict)


class MegatronBertForSequenceClassification(Classifier):
    """A class, several labels, or values for each sequence: logits ``[B, num_labels]``."""

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
        given = _arguments(locals())
        encoded, logits = self.classified(given)
        loss = None if labels is None else problem_loss(self.config.problem_type, logits, labels)
        return self.returned(_finish(SequenceClassifierOutput(loss=loss, logits=logits), encoded), return_dict)


class MegatronBertForMultipleChoice(Classifier):
    """Which of several continuations is right: logits ``[B, choices]``."""

    def outputs(self, config: MegatronBertConfig) -> int:
        """One score a choice."""
        del config
        return 1

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
        given = _arguments(locals())
        either = input_ids if input_ids is not None else inputs_embeds
        if either is not None and either.dim() != (3 if input_ids is not None else 4):
            raise UserError(f"the inputs have shape {list(either.shape)}, expected [batch, choices, tokens]")
        encoded, scores = self.classified(_flattened(given))
        assert either is not None
        logits = scores.view(-1, either.shape[1])
        loss = None if labels is None else mean_cross_entropy("labels", logits, labels.reshape(-1))
        return self.returned(_finish(MultipleChoiceModelOutput(loss=loss, logits=logits), encoded), return_dict)


class MegatronBertForTokenClassification(Classifier):
    """A class for each token: logits ``[B, S, num_labels]``."""

    pooled = False

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
        given = _arguments(locals())
        encoded, scores = self.classified(given)
        logits = encoded.rectangle(scores)
        loss = None
        if labels is not None:
            _check_shape("labels", labels, (encoded.batch, encoded.length))
            loss = mean_cross_entropy("labels", logits.flatten(0, 1), labels.reshape(-1))
        return self.returned(_finish(TokenClassifierOutput(loss=loss, logits=logits), encoded), return_dict)


class MegatronBertForQuestionAnswering(Classifier):
    """Where an answer starts and ends: logits ``[B, S]`` each."""

    pooled = False
    head = "qa_outputs"

    def outputs(self, config: MegatronBertConfig) -> int:
        """Start and end."""
        if config.num_labels != 2:
            raise UserError(f"num_labels is {config.num_labels}, but an answer has a start and an end: leave it at 2")
        return 2

    def dropped(self, features: Tensor, keys: Tensor | None) -> Tensor:
        """No dropout before this head."""
        del keys
        return features

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
        given = _arguments(locals())
        encoded, scores = self.classified(given)
        start, end = (part.contiguous() for part in encoded.rectangle(scores).unbind(-1))
        losses = [
            mean_cross_entropy(name, logits, positions.reshape(-1).clamp(0, encoded.length), ignored=encoded.length)
            for name, logits, positions in (
                ("start_positions", start, start_positions),
                ("end_positions", end, end_positions),
            )
            if positions is not None
        ]
        loss = sum(losses[1:], losses[0]) / len(losses) if losses else None
        output = QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end)
        return self.returned(_finish(output, encoded), return_dict)


_SHARED = {field.name for field in fields(Arguments)}


def _arguments(given: dict[str, Any]) -> Arguments:
    """The arguments of a forward method that all classes share."""
    return Arguments(**{name: value for name, value in given.items() if name in _SHARED})


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")


def _flattened(given: Arguments) -> Arguments:
    """Choices as further sequences of the batch."""
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
    tensors = {name: getattr(given, name) for name in names}
    for name, tensor in tensors.items():
        least = 4 if name == "inputs_embeds" else 3
        if tensor is not None and tensor.dim() < least:
            raise UserError(f"{name} has shape {list(tensor.shape)}, expected [batch, choices, tokens]")
    return replace(given, **{name: None if t is None else t.flatten(0, 1) for name, t in tensors.items()})
