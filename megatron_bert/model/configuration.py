# SPDX-License-Identifier: Apache-2.0
"""Sizes and constants of an encoder of any family, as plain values with the field names of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron_bert.model.activations import ACTIVATIONS
from megatron_bert.model.configuration_checks import check_values
from parallel.errors import ArgumentError, UserError, brief

CONFIG_NAME = "config.json"
MODEL_TYPE = "megatron-bert"


def numbered_labels(classes: int) -> dict[int, str]:
    """The names of classes that have none: ``LABEL_0`` and so on."""
    return {number: f"LABEL_{number}" for number in range(classes)}


def named_labels(
    id2label: Mapping[Any, Any] | None, label2id: Mapping[Any, Any] | None = None, count: int | None = None
) -> dict[int, str]:
    """The names of the classes by number, in order, from the three ways to say them.

    Names that somebody gave count before automatic ones (``LABEL_0``, ..), which may come from a copied configuration.

    Args:
        id2label, label2id: names by number and numbers by name, as JSON or a user gives them; either may be missing.
        count: number of classes; that of the names, or 2, where it is None.

    Raises:
        UserError: they are something else, or more or fewer than ``count``.
    """
    if count is not None and (type(count) is not int or count < 1):
        raise ArgumentError(f"$num_labels is {count!r}: give a whole number of 1 or more")
    try:
        by_number = {int(number): str(name) for number, name in (id2label or {}).items()}
        by_name = {int(number): str(name) for name, number in (label2id or {}).items()}
    except (AttributeError, TypeError, ValueError, RuntimeError):  # a tensor's truth is a RuntimeError
        raise ArgumentError(
            f"$id2label is {id2label!r} and $label2id {label2id!r}: give a name for each class number, such "
            "as {0: 'no', 1: 'yes'}"
        ) from None
    automatic = by_number == numbered_labels(len(by_number))
    names = dict(sorted((by_name if by_name and automatic else by_number).items()))
    if names and count is not None and len(names) != count:
        raise ArgumentError(f"$num_labels is {count}, but $id2label names {len(names)} classes")
    return names or numbered_labels(count or 2)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes and constants of an encoder, its heads and its decoder; Megatron's BERT, unless a subclass is of another.

    Fields mean what they do in transformers' MegatronBertConfig, and in the documented one that describes each
    (:class:`megatron_bert.family.configuration.MegatronBertConfig`).

    Attributes:
        hidden_act: ``gelu`` (exact, erf), ``gelu_new`` / ``gelu_pytorch_tanh`` (tanh approximation), ``relu``, or
            ``silu`` / ``swish``; of the feed-forward layers and the masked-language head.
        id2label: names of the classes of a classification head; two that are numbered by default.
        problem_type: ``regression``, ``single_label_classification`` or ``multi_label_classification``; None finds it
            from the labels.
        vocab_size_multiple: the embedding table is padded to a multiple of this many rows.
        binary_head: whether there is a pooler and a two-way sentence-pair head.
        layer_norm_placement: ``pre``, norms before attention and feed-forward and at the end, as MegatronBERT has; or
            ``post``, after each sum and after the embeddings, as BERT and RoBERTa have.

    Raises:
        UserError: a value that a field cannot have.
    """

    #: What config.json calls this kind of model.
    model_type = MODEL_TYPE
    #: What it calls other kinds whose fields mean the same.
    also_reads = frozenset[str]()
    #: Whether positions, inputs and the head of sequences are RoBERTa's.
    like_roberta = False

    vocab_size: int = 29056
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    # A token id or None; Any, as it is never None where positions are counted from it, which a type cannot say.
    pad_token_id: Any = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    position_embedding_type: str = "absolute"
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    id2label: dict[int, str] | None = None
    problem_type: str | None = None
    classifier_dropout: float | None = None
    pruned_heads: dict[int, list[int]] | None = None
    vocab_size_multiple: int = 128
    scaled_output_init: bool = True
    binary_head: bool = True
    layer_norm_placement: str = "pre"

    def __post_init__(self) -> None:
        self.__dict__["id2label"] = named_labels(self.id2label)
        check_values(self, ACTIVATIONS)
        self.check()

    def check(self) -> None:
        """Check what only this family asks of a field.

        Raises:
            UserError: for the first that is wrong, with what it may be.
        """

    @property
    def num_labels(self) -> int:
        """Classes of the classification heads."""
        return len(self.id2label or ())

    @property
    def classifier_dropout_prob(self) -> float:
        """Probability of dropout before the head of a task."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    @property
    def head_dim(self) -> int:
        """Dimensions of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def padding_position(self) -> int | None:
        """The position of padding, after which real tokens are counted; None where all are counted from 0."""
        return self.pad_token_id if self.like_roberta else None

    @property
    def first_position(self) -> int:
        """The position of the first token of a sequence."""
        return 0 if self.padding_position is None else self.padding_position + 1

    @property
    def longest_sequence(self) -> int:
        """Tokens that there are positions for."""
        return self.max_position_embeddings - self.first_position

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table."""
        return -(-self.vocab_size // self.vocab_size_multiple) * self.vocab_size_multiple

    @property
    def output_init_std(self) -> float:
        """Standard deviation of the initial output projections (attention output, second feed-forward matrix)."""
        if not self.scaled_output_init:
            return self.initializer_range
        return self.initializer_range / (2 * self.num_hidden_layers) ** 0.5

    def to_dict(self) -> dict[str, Any]:
        """All fields and the model type, as :func:`config_from_dict` takes them; plain values that JSON can hold."""
        return {"model_type": self.model_type, **{field.name: getattr(self, field.name) for field in fields(self)}}


@dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """Sizes and constants of a BERT: post-layer-norm, all else as MegatronBERT has it."""

    model_type = "bert"
    layer_norm_placement: str = "post"


@dataclass(frozen=True, kw_only=True)
class RobertaConfig(EncoderConfig):
    """Sizes and constants of a RoBERTa, XLM-RoBERTa or I-BERT: post-layer-norm, positions counted after padding's."""

    model_type = "ibert"  # whose classes compute in integers too
    also_reads = frozenset({"roberta", "xlm-roberta"})
    like_roberta = True
    pad_token_id: int = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    scaled_output_init: bool = False
    layer_norm_placement: str = "post"

    def __post_init__(self) -> None:
        for name, (value, why) in _OF_IBERT.items():
            if getattr(self, name) != value:
                raise ArgumentError(f"${name} is {getattr(self, name)!r}, but {why}: leave it at {value!r}")
        super().__post_init__()

    def check(self) -> None:
        """Check what the positions ask for.

        Raises:
            UserError: for the first that is wrong, with what it may be.
        """
        if self.pad_token_id is None:
            raise ArgumentError("$pad_token_id is None, but positions are counted after it: give the id of padding")
        if self.longest_sequence < 1:
            raise ArgumentError(
                f"$max_position_embeddings is {self.max_position_embeddings}, but positions start after "
                f"$pad_token_id {self.pad_token_id}: give at least {self.pad_token_id + 2}"
            )


#: Fields that have one value with RoBERTa's and I-BERT's classes, and why.
_OF_IBERT = {
    "layer_norm_placement": ("post", "I-BERT normalizes after each sum"),
    "hidden_act": ("gelu", "the integer function is of the exact GELU"),
    "position_embedding_type": ("absolute", "I-BERT has no other"),
    "is_decoder": (False, "I-BERT is an encoder"),
    "add_cross_attention": (False, "I-BERT is an encoder"),
}

MegatronBertConfig = EncoderConfig
#: Of the largest number in a file; what is larger cannot even be printed.
_MOST_BITS = 40
#: model_type in a file -> class of the configuration.
CONFIG_CLASSES: dict[str, type[EncoderConfig]] = {
    name: kind for kind in (EncoderConfig, BertConfig, RobertaConfig) for name in (kind.model_type, *kind.also_reads)
}


def config_from_dict(values: Mapping[str, Any], label: str) -> EncoderConfig:
    """The inverse of :meth:`EncoderConfig.to_dict`.

    Args:
        values: model_type, and fields; those that are not there have their defaults.
        label: what holds them, for messages.

    Raises:
        UserError: another type of model, an unknown field, or a value that a field cannot have.
    """
    kind = CONFIG_CLASSES.get(str(values.get("model_type", MODEL_TYPE)))
    if kind is None:
        raise UserError(f"{label} is of a {brief(values['model_type'])}: expected one of {', '.join(CONFIG_CLASSES)}")
    unknown = sorted(values.keys() - kind.__dataclass_fields__.keys() - {"model_type"})
    if unknown:
        raise UserError(
            f"{label} gives an encoder {brief(', '.join(unknown))}, which it does not have here: use the version of "
            "megatron-bert that wrote it"
        )
    for name, value in values.items():
        if type(value) is int and value.bit_length() > _MOST_BITS:
            raise UserError(f"{label} gives {name} a number that no model has: it is damaged")
    try:
        return kind(**{name: value for name, value in values.items() if name != "model_type"})
    except UserError as error:
        raise UserError(f"{label} does not fit: {brief(error, 300)}") from None
