# SPDX-License-Identifier: Apache-2.0
"""The documented configuration of MegatronBERT: transformers' base class around the plain sizes of the encoder."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

from megatron_bert.json_file import read_object
from megatron_bert.model.activations import ACTIVATIONS, GELU_SYNONYMS
from megatron_bert.model.configuration import EncoderConfig, named_labels
from megatron_bert.model.configuration_checks import NUMBER_FORMATS, check_choice, check_switch
from megatron_bert.model.directories import made_directory
from parallel.errors import ArgumentError, UserError
from parallel.whole_files import reporting, write_text

logger = logging.get_logger(__name__)

#: The three ways to say what the classes of a head are, which follow one another.
_LABELS = ("id2label", "label2id", "num_labels")
#: What forward passes return unless the call says otherwise, with arguments of these names.
SWITCHES = ("use_cache", "output_attentions", "output_hidden_states", "return_dict")
#: How near a name must be to that of a field for a warning.
_NEAR = 0.85


class DocumentedConfig(PreTrainedConfig):
    """What the configurations of both families share: checked values, names of classes, and the plain sizes.

    Values are checked when they are given, in the constructor or by assignment. Fields that are not known are kept, as
    in every configuration of transformers; a warning names those that are nearly those of a field.
    """

    #: The plain configuration that the encoder is built from.
    encoder_class: ClassVar[type[EncoderConfig]] = EncoderConfig

    #: Whether ``hidden_act`` may be what transformers alone has, and any function.
    takes_every_activation: ClassVar[bool] = True

    #: Checked fields that the encoder has not.
    _others: ClassVar[tuple[str, ...]] = ("dtype",)

    vocab_size: int = 29056
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str | Callable[[torch.Tensor], torch.Tensor] = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    position_embedding_type: str = "absolute"
    tie_word_embeddings: bool = True
    classifier_dropout: float | None = None
    pruned_heads: dict[int, list[int]] | None = None
    scaled_output_init: bool = True
    vocab_size_multiple: int = 128

    def __post_init__(self, **kwargs: Any) -> None:
        held = self.__dict__
        if (other_name := kwargs.pop("torch_dtype", None)) is not None and held.get("dtype") is None:
            held["dtype"] = other_name
        if held.get("position_embedding_type", "") is None:  # some writers leave it to the default
            held["position_embedding_type"] = "absolute"
        self._name_labels(held.get("id2label"), held.get("label2id"), kwargs.pop("num_labels", None))
        known = self.encoder_class.__dataclass_fields__.keys() | SWITCHES
        self._checked(**{name: value for name, value in kwargs.items() if name in known and value is not None})
        for name in kwargs:
            if hasattr(type(self), name):
                continue
            near = difflib.get_close_matches(name, self.__dataclass_fields__, n=1, cutoff=_NEAR)
            if near and not name.startswith("_"):
                logger.warning("%s has no field %s: did you mean %s?", type(self).__name__, name, near[0])
        super().__post_init__(**kwargs)
        held["_checks"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        checked = name in self.encoder_class.__dataclass_fields__ or name in (*_LABELS, *SWITCHES, *self._others)
        if not checked or "_checks" not in self.__dict__:
            super().__setattr__(name, value)
            return
        before = dict(self.__dict__)
        try:
            if name in _LABELS:
                given = dict.fromkeys(_LABELS) | {name: value}
                if name == "num_labels" and value == self.num_labels:
                    given["id2label"] = self.id2label
                self._name_labels(**given)
            else:
                super().__setattr__(name, value)
            self._checked()
        except UserError:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _name_labels(self, id2label: Any, label2id: Any, num_labels: Any) -> None:
        names = named_labels(id2label, label2id, num_labels)
        self.__dict__["id2label"] = names
        self.__dict__["label2id"] = {name: number for number, name in names.items()}

    # Of its own, as transformers refuses it for attention that gives no probabilities; here every way of computing it
    # gives them when they are asked for.
    @property
    def output_attentions(self) -> bool | None:
        """Whether forward passes return attention probabilities by default."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool | None) -> None:
        self._output_attentions = value

    def encoder_config(self) -> EncoderConfig:
        """The plain configuration of the encoder under a model.

        Raises:
            UserError: a value that a field cannot have.
        """
        return self._checked()

    def _checked(self, **others: Any) -> EncoderConfig:
        held = self.__dict__
        values = {name: held[name] for name in self.encoder_class.__dataclass_fields__ if name in held}
        held_switches = {**held, "output_attentions": held.get("_output_attentions") or False}
        for name in SWITCHES:
            check_switch(name, others.pop(name, held_switches.get(name, False)))
        dtype = held.get("dtype")
        check_choice("dtype", None if dtype is None else str(dtype).removeprefix("torch."), (None, *NUMBER_FORMATS))
        act = values["hidden_act"]
        act = GELU_SYNONYMS.get(act, act) if isinstance(act, str) else act
        if self.takes_every_activation:
            names = sorted(ACTIVATIONS.keys() | ACT2FN.keys())
            if not callable(act) and not (isinstance(act, str) and act in names):
                raise ArgumentError(f"$hidden_act is {act!r}: give a function, or choose one of {', '.join(names)}")
            act = act if act in ACTIVATIONS else "gelu"
        plain = self.encoder_class(**values | others | {"hidden_act": act})
        held["pruned_heads"] = plain.pruned_heads
        return plain

    @classmethod
    def of(cls, config: Any) -> Any:
        """A configuration of this class in place of transformers' own of the same type of model; all else as it is."""
        theirs = isinstance(config, PreTrainedConfig) and not isinstance(config, cls)
        return cls.from_dict(config.to_dict()) if theirs and config.model_type == cls.model_type else config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration from the contents of a config.json; a number of classes replaces the names of others.

        Raises:
            UserError: it is of another type of model, whose tensors would not be found.
        """
        kind = config_dict.get("model_type") or cls.model_type
        if kind != cls.model_type and kind not in cls.encoder_class.also_reads:
            raise UserError(f"the configuration has model_type {str(kind)[:40]!r}: expected {cls.model_type}")
        if kwargs.get("num_labels") is not None and kwargs.get("id2label") is None:
            config_dict = {name: value for name, value in config_dict.items() if name not in _LABELS}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers does; but a directory without a config.json is not a model of default sizes.

        Raises:
            OSError: there is none.
        """
        place = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if place.is_dir() and not (place / "config.json").exists() and not kwargs.get("gguf_file"):
            raise OSError(f"{place} holds no config.json: give the directory of a saved model")
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        return cls._decode_special_floats(read_object(Path(json_file)))

    def to_dict(self) -> dict[str, Any]:
        """Everything that is set, as JSON holds it; a function by its name."""
        values = super().to_dict()
        values.pop("_checks", None)
        if callable(act := values.get("hidden_act")):
            values["hidden_act"] = getattr(act, "__name__", type(act).__name__)
        return values

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write config.json into a directory.

        Raises:
            UserError: no such directory can be made, or ``hidden_act`` is a function, which a file cannot hold.
        """
        made_directory(save_directory)
        if callable(self.hidden_act):
            raise ArgumentError("$hidden_act is a function, which a file cannot hold: name it after loading again")
        with reporting("written", Path(save_directory), "make room, or give another directory"):
            super().save_pretrained(save_directory, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """As transformers does, but a file is whole, or is the one from before."""
        write_text(Path(json_file_path), self.to_json_string(use_diff=use_diff))

    def replaced(self, **changes: Any) -> Self:
        """The same configuration with some fields changed."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if changes.keys() & set(_LABELS):
            values = {name: value for name, value in values.items() if name not in _LABELS}
        return type(self)(**values | changes)


class MegatronBertConfig(DocumentedConfig):
    """Sizes and constants of a Megatron BERT encoder or decoder.

    Attributes:
        vocab_size: number of token ids in use.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of transformer layers.
        num_attention_heads: attention heads per layer; must divide hidden_size.
        intermediate_size: width of the feed-forward layer.
        hidden_act: a name of transformers' activations, or a function; of the feed-forward layers and the
            masked-language head.
        hidden_dropout_prob: dropout of embeddings, attention output and feed-forward output.
        attention_probs_dropout_prob: dropout of attention probabilities.
        max_position_embeddings: rows of the position table.
        type_vocab_size: number of token types (segments).
        initializer_range: standard deviation of initial weights.
        layer_norm_eps: added to the variance in every layer norm. Megatron's weights were trained with 1e-5.
        pad_token_id: id of the padding token, whose embedding gets no gradient from where it is looked up; or None.
        bos_token_id, eos_token_id: ids that open and end a generated text; there may be several that end it.
        position_embedding_type: ``absolute``, or ``relative_key`` / ``relative_key_query`` (Shaw et al.,
            arXiv 1803.02155; Huang et al., arXiv 2009.13658).
        is_decoder: attend to the past only, and keep keys and values for decoding.
        add_cross_attention: attend to an encoder's hidden states in every layer; of decoders only.
        use_cache: whether a decoder returns its keys and values unless the call says otherwise.
        tie_word_embeddings: the word embeddings are the output matrix of the language-model heads too.
        classifier_dropout: dropout before the classification heads; None takes hidden_dropout_prob.
        pruned_heads: layer -> heads that were removed from it.
        scaled_output_init: initialize output projections with initializer_range / sqrt(2 * layers), as Megatron does.
        vocab_size_multiple: with tensor parallelism the vocabulary is padded to a multiple of this many rows.
    """

    model_type = "megatron-bert"

    is_decoder: bool = False
    add_cross_attention: bool = False
    use_cache: bool = True
