"""What forward passes return: fields by attribute, by name and by place.

Shapes: B sequences, S tokens, H hidden size, V vocabulary, E encoder tokens, P cached tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from megatron_bert.family.cache import KeyValueCache

Tensors = tuple[Tensor, ...]


class ModelOutput(Mapping[str, Any]):
    """A dataclass whose fields that are not None can also be had by name or by place.

    ``output.logits``, ``output["logits"]`` and ``output[0]`` are the same tensor, where no loss comes before it.
    """

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return self._present()[key]
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())

    def _present(self) -> dict[str, Any]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in named.items() if value is not None}


@dataclass(eq=False)
class BaseModelOutputWithPoolingAndCrossAttentions(ModelOutput):
    """Of :class:`~megatron_bert.family.bert.MegatronBertModel`.

    Attributes:
        last_hidden_state: ``[B, S, H]``.
        pooler_output: ``[B, H]``; None without a pooling layer.
        hidden_states: L + 1 of ``[B, S, H]``: the embeddings, the unnormalised stream after each layer but the last,
            and ``last_hidden_state``; None unless asked for.
        past_key_values: for the next step of decoding; None unless asked for.
        attentions: L of ``[B, heads, S, P + S]``; None unless asked for.
        cross_attentions: L of ``[B, heads, S, E]``; None unless asked for, of a decoder with an encoder.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: Tensors | None = None
    past_key_values: KeyValueCache | None = None
    attentions: Tensors | None = None
    cross_attentions: Tensors | None = None


@dataclass(eq=False)
class MegatronBertForPreTrainingOutput(ModelOutput):
    """Losses of masked words and sentence pairs, summed, with logits ``[B, S, V]`` and ``[B, 2]``."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class MaskedLMOutput(ModelOutput):
    """Mean loss over labelled tokens; logits ``[B, S, V]``."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class CausalLMOutputWithCrossAttentions(ModelOutput):
    """Mean loss of predicting each next token; logits ``[B, S, V]``."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KeyValueCache | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    cross_attentions: Tensors | None = None


@dataclass(eq=False)
class NextSentencePredictorOutput(ModelOutput):
    """Mean loss over pairs; logits ``[B, 2]``: 0 says the second sentence follows, 1 that it is a random one."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class SequenceClassifierOutput(ModelOutput):
    """Loss of the problem's type; logits ``[B, num_labels]``."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class MultipleChoiceModelOutput(ModelOutput):
    """Mean loss over questions; logits ``[B, choices]``."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class TokenClassifierOutput(ModelOutput):
    """Mean loss over labelled tokens; logits ``[B, S, num_labels]``."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class QuestionAnsweringModelOutput(ModelOutput):
    """Mean of the losses of start and end; logits ``[B, S]`` each."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
