# SPDX-License-Identifier: Apache-2.0
"""Classes with a classification head: sentence pairs, sequences, choices, tokens and answer spans.

Shapes: B sequences, S tokens of each, C classes or choices.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.modeling_outputs import (
    ModelOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from megatron_bert.family.arguments import Arguments, check_shape, shared_arguments
from megatron_bert.family.bert import MegatronBertHeadModel
from megatron_bert.family.checks import check_whole
from megatron_bert.family.encoder import Encoded, HeadModel
from megatron_bert.family.losses import mean_cross_entropy, problem_loss
from megatron_bert.family.parts import drop, without_values
from megatron_bert.model.configuration import EncoderConfig
from megatron_bert.model.task_heads.choice import ChoiceKind
from megatron_bert.model.task_heads.span import SpanKind
from megatron_bert.model.task_heads.token import TokenKind
from parallel.cross_entropy import IGNORED
from parallel.errors import UserError


class Classifier(HeadModel):
    """The encoder and a head that every tensor rank repeats, dense unless a class has another."""

    #: Whether the head reads one vector of every sequence, or every token.
    by_sequence: ClassVar[bool] = True
    #: Name of the head.
    head: ClassVar[str] = "classifier"
    #: Whether dropout precedes it.
    drops: ClassVar[bool] = True

    def build(self, **parts: Any) -> None:
        """Make the modules."""
        super().build(**parts)
        if self.drops:
            self.dropout = nn.Dropout(self.sizes.classifier_dropout_prob)
        self.add_module(self.head, self.head_module())

    @property
    def num_labels(self) -> int:
        """Number of classes or values, as configured."""
        return int(self.config.num_labels)

    def head_module(self) -> nn.Module:
        """The head."""
        return without_values(nn.Linear, self.sizes.hidden_size, self.outputs(self.sizes))

    def outputs(self, config: EncoderConfig) -> int:
        """Width of the head."""
        return config.num_labels

    def vectors(self, encoded: Encoded) -> Tensor:
        """What the head reads of every sequence, ``[B, H]``."""
        return self.base_model.pooled(encoded)

    def scores(self, features: Tensor, dropout_keys: Tensor | None) -> Tensor:
        """The head: ``[N, H]`` to ``[N, C]``."""
        head: nn.Module = self.get_submodule(self.head)
        return head(drop(features, self.dropout, dropout_keys) if self.drops else features)

    def head_dropout(self) -> nn.Module | None:
        """The dropout module before the head, or in it."""
        return getattr(self if self.drops else self.get_submodule(self.head), "dropout", None)

    def classified(
        self, given: Arguments, *, shown: bool = False, needed: Tensor | None = None
    ) -> tuple[Encoded, Tensor]:
        """Run the encoder and the head: logits ``[B, C]`` of sequences, or ``[T, C]`` of every token.

        Arguments are those of EncoderModel.encode.
        """
        encoded = self.base_model.encode(given, shown=shown, needed=needed, dropout=self.head_dropout())
        return encoded, self.read(encoded)

    def read(self, encoded: Encoded) -> Tensor:
        """The head on what the encoder gave: logits as of :meth:`classified`."""
        if not self.by_sequence:
            return self.scores(encoded.hidden, encoded.dropout_keys)
        dropout_keys = None if encoded.dropout_keys is None else encoded.dropout_keys.index_select(0, encoded.first)
        return self.scores(self.vectors(encoded), dropout_keys)

    def class_loss(self, name: str, encoded: Encoded, logits: Tensor, labels: Tensor, ignored: int = IGNORED) -> Tensor:
        """Mean cross entropy of logits ``[N, C]`` with labels that were given under a name."""
        return mean_cross_entropy(name, logits, labels, lambda: self.read(encoded.blank()), ignored)

    def finished(self, output: ModelOutput, encoded: Encoded, return_dict: bool | None) -> Any:
        """An output with what was asked of the encoder besides, in the form asked for."""
        whole = type(output)(**output, hidden_states=encoded.hidden_states, attentions=encoded.attentions)
        return self.returned(whole, return_dict)


class SequenceClassifier(Classifier):
    """A class, several labels, or values for each sequence."""

    def problem_loss(self, encoded: Encoded, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of the configuration's problem; apart from ``forward``, whose locals() must hold arguments alone."""
        return problem_loss(self.config.problem_type, logits, labels, lambda: self.read(encoded.blank()))

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
        """Classify sequences: logits ``[B, num_labels]``; other arguments as of EncoderModel.

        ``labels``: int64 ``[B]`` class numbers, float ``[B, num_labels]`` 0 and 1 for several labels, or float ``[B]``
        or ``[B, num_labels]`` values for a regression. ``config.problem_type`` says which; if it is None it is found
        from the labels each time: one class is a regression, whole numbers are classes, others several labels.
        """
        encoded, logits = self.classified(shared_arguments(locals()))
        loss = None if labels is None else self.problem_loss(encoded, logits, labels)
        return self.finished(SequenceClassifierOutput(loss=loss, logits=logits), encoded, return_dict)


class ChoiceClassifier(Classifier):
    """Which of several continuations is right."""

    def outputs(self, config: EncoderConfig) -> int:
        """One score a choice."""
        del config
        return ChoiceKind.outputs

    def chosen(self, given: Arguments, labels: Tensor | None, return_dict: bool | None) -> Any:
        """Logits ``[B, choices]`` of inputs ``[B, choices, S]``, and the loss where there are ``labels`` ``[B]``."""
        either = given.either
        if either is not None and either.dim() != (3 if given.input_ids is not None else 4):
            raise UserError(f"the inputs have shape {list(either.shape)}, expected [batch, choices, tokens]")
        encoded, scores = self.classified(_flattened(given))
        assert either is not None
        logits = scores.view(-1, either.shape[1])
        loss = None if labels is None else self.class_loss("labels", encoded, logits, labels)
        return self.finished(MultipleChoiceModelOutput(loss=loss, logits=logits), encoded, return_dict)


class TokenClassifier(Classifier):
    """A class for each token."""

    by_sequence, pooled = TokenKind.by_sequence, TokenKind.pooled

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
        """Classify tokens: logits ``[B, S, num_labels]``; other arguments as of EncoderModel.

        ``labels`` int64 ``[B, S]``, -100 where a token does not count.
        """
        given = shared_arguments(locals())
        needed = None
        if labels is not None and given.shape is not None:
            check_shape("labels", labels, given.shape)
            needed = labels != IGNORED
        encoded, scores = self.classified(given, shown=not self.learns_from(labels), needed=needed)
        logits = encoded.rectangle(scores)
        loss = None if labels is None else self.class_loss("labels", encoded, logits.flatten(0, 1), labels)
        return self.finished(TokenClassifierOutput(loss=loss, logits=logits), encoded, return_dict)


class SpanClassifier(Classifier):
    """Where an answer starts and ends."""

    by_sequence, pooled, head = SpanKind.by_sequence, SpanKind.pooled, SpanKind.module
    drops = False

    def outputs(self, config: EncoderConfig) -> int:
        """Start and end."""
        if config.num_labels != 2:
            raise UserError(f"num_labels is {config.num_labels}, but an answer has a start and an end: leave it at 2")
        return 2

    def span_loss(self, encoded: Encoded, found: dict[str, tuple[Tensor, Tensor | None]]) -> Tensor | None:
        """The mean loss of the positions that are given; apart from ``forward``, as of SequenceClassifier."""
        length = encoded.length
        losses = [
            self.class_loss(name, encoded, logits, _within(name, positions, length), ignored=length)
            for name, (logits, positions) in found.items()
            if positions is not None
        ]
        return sum(losses[1:], losses[0]) / len(losses) if losses else None

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
        """Find answers: logits ``[B, S]`` of start and end; other arguments as of EncoderModel.

        ``start_positions`` and ``end_positions`` int64 ``[B]``, S or more where it is cut off. The loss is the mean of
        both (or the one that is given); positions beyond the tokens do not count.
        """
        # The loss runs over padding too.
        encoded, scores = self.classified(shared_arguments(locals()), shown=True)
        start, end = (part.contiguous() for part in encoded.rectangle(scores).unbind(-1))
        found = {"start_positions": (start, start_positions), "end_positions": (end, end_positions)}
        loss = self.span_loss(encoded, found)
        output = QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end)
        return self.finished(output, encoded, return_dict)


def _within(name: str, positions: Tensor, length: int) -> Tensor:
    """Positions of answers, those beyond the tokens as the first that is beyond."""
    check_whole(name, positions)
    return positions.clamp(0, length)


def _flattened(given: Arguments) -> Arguments:
    """Choices as further sequences of the batch."""
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
    tensors = {name: getattr(given, name) for name in names}
    for name, tensor in tensors.items():
        least = 4 if name == "inputs_embeds" else 3
        if tensor is not None and tensor.dim() < least:
            raise UserError(f"{name} has shape {list(tensor.shape)}, expected [batch, choices, tokens]")
    return replace(given, **{name: None if t is None else t.flatten(0, 1) for name, t in tensors.items()})


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
