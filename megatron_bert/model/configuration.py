# SPDX-License-Identifier: Apache-2.0
"""The configuration of an encoder: plain values, with the field names of Hugging Face's MegatronBertConfig."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

from megatron_bert.json_file import read_object
from megatron_bert.model.activations import ACTIVATIONS, GELU_SYNONYMS
from megatron_bert.model.configuration_checks import check_values
from megatron_bert.model.directories import directory_path, made_directory
from parallel.errors import UserError

CONFIG_NAME = "config.json"
MODEL_TYPE = "megatron-bert"
#: Classes of a classification head, unless said otherwise.
_CLASSES = 2

#: Settings of other frameworks that their config.json files hold and that change no result here.
_WITHOUT_MEANING = frozenset(
    {
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "_num_labels",
        "architectures",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "directionality",
        "finetuning_task",
        "gradient_checkpointing",
        "is_encoder_decoder",
        "language",
        "model_type",
        "name",
        "padding",
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
        "prefix",
        "task_specific_params",
        "tf_legacy_loss",
        "tokenizer_class",
        "tokenizer_type",
        "torchscript",
        "transformers_version",
        "use_bfloat16",
        "xla_device",
        # Of Google's first BERT, read by no implementation.
        "pooler_type",
        # Of generating text, which takes them as arguments.
        "bad_words_ids",
        "begin_suppress_tokens",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_ids",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_past",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "temperature",
        "tie_encoder_decoder",
        "top_k",
        "top_p",
        "typical_p",
    }
)
#: Their names for fields.
_ALIASES = {"dtype": "torch_dtype", "use_return_dict": "return_dict"}

_Config = TypeVar("_Config")


def _numbered(classes: int) -> dict[int, str]:
    return {number: f"LABEL_{number}" for number in range(classes)}


def _automatic(names: dict[int, str]) -> bool:
    return names == _numbered(len(names))


def unknown_name(name: str, known: Iterable[str], what: str) -> UserError:
    """The error for a name that is not among the known ones, with the one that was probably meant."""
    near = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f"did you mean {near[0]}?" if near else "see docs/models.md for those there are"
    return UserError(f"{name[:60]!r} is no {what}: {hint}")


def explaining_names(cls: type[_Config]) -> type[_Config]:
    """Make the constructor of a dataclass answer unknown names with the nearest known one."""
    construct: Callable[..., None] = cls.__init__

    @functools.wraps(construct)
    def checked(self: _Config, **values: Any) -> None:
        for name in values:
            if name not in cls.__dataclass_fields__:  # type: ignore[attr-defined]
                raise unknown_name(name, cls.__dataclass_fields__, f"field of {cls.__name__}")  # type: ignore[attr-defined]
        construct(self, **values)

    cls.__init__ = checked  # type: ignore[method-assign,assignment]
    return cls


@explaining_names
@dataclass(kw_only=True)
class EncoderConfig:
    """Sizes and constants of an encoder, its heads and its decoder: plain values, by the names the field has for them.

    Every value is checked when it is given, in the constructor or by assignment. What is assigned after a model was
    built matters to what its next forward pass looks up (``problem_type``, ``use_cache``, ``return_dict`` and the
    ``output_`` fields), not to its sizes.

    Attributes:
        vocab_size: number of token ids in use.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of transformer layers.
        num_attention_heads: attention heads a layer; must divide hidden_size.
        intermediate_size: width of the feed-forward layer.
        hidden_act: ``gelu`` (exact, erf), ``gelu_new`` / ``gelu_pytorch_tanh`` (tanh approximation), ``relu``, or
            ``silu`` / ``swish``; of the feed-forward layers and the masked-language head.
        hidden_dropout_prob: dropout of embeddings, attention output and feed-forward output.
        attention_probs_dropout_prob: dropout of attention probabilities.
        max_position_embeddings: rows of the position table; ``longest_sequence`` tokens fit.
        type_vocab_size: number of token types (segments).
        initializer_range: standard deviation of initial weights.
        layer_norm_eps: added to the variance in every layer norm. Megatron's weights were trained with 1e-5.
        pad_token_id: id of the padding token, whose embedding gets no gradient from where it is looked up; None where
            no token is special so.
        bos_token_id, eos_token_id: ids that open and end a generated text; there may be several that end it.
        position_embedding_type: ``absolute``, or ``relative_key`` / ``relative_key_query`` (Shaw et al.,
            arXiv 1803.02155; Huang et al., arXiv 2009.13658).
        is_decoder: attend to the past only, and keep keys and values for decoding.
        add_cross_attention: attend to an encoder's hidden states in every layer; of decoders only.
        use_cache: whether a decoder returns its keys and values when it is not told.
        tie_word_embeddings: the word embeddings are the output matrix of the language-model heads too.
        num_labels: classes of the classification heads; those that are named, or 2.
        id2label, label2id: names of the classes, ``LABEL_0`` and so on by default.
        problem_type: ``regression``, ``single_label_classification`` or ``multi_label_classification``; None finds it
            from the labels.
        classifier_dropout: dropout before the classification heads; None takes hidden_dropout_prob.
        pruned_heads: layer -> heads that were removed from it.
        torch_dtype: number format of the weights, as ``float32``; None where it is not known.
        output_attentions, output_hidden_states, return_dict: what forward passes return when they are not told.
        vocab_size_multiple: the embedding table is padded to a multiple of this many rows.
        scaled_output_init: initialize output projections with initializer_range / sqrt(2 * layers), as Megatron does.
        binary_head: whether there is a pooler and a two-way sentence-pair head.
        layer_norm_placement: ``pre``, norms before attention and feed-forward and at the end, as MegatronBERT has; or
            ``post``, after each sum and after the embeddings, as BERT and RoBERTa have.
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
    use_cache: bool = True
    tie_word_embeddings: bool = True
    num_labels: int = 0
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    classifier_dropout: float | None = None
    pruned_heads: dict[int, list[int]] | None = None
    torch_dtype: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    vocab_size_multiple: int = 128
    scaled_output_init: bool = True
    binary_head: bool = True
    layer_norm_placement: str = "pre"

    def __post_init__(self) -> None:
        self._name_labels()
        self.check()
        self.__dict__["_complete"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dataclass_fields__:
            raise unknown_name(name, self.__dataclass_fields__, f"field of {type(self).__name__}")
        before = dict(self.__dict__)
        self.__dict__[name] = value
        if "_complete" not in before:
            return
        try:
            self._name_labels(changed=name)
            self.check()
        except UserError:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def check(self) -> None:
        """Check every field.

        Raises:
            UserError: for the first that is wrong, with what it may be.
        """
        check_values(self, ACTIVATIONS)

    def _name_labels(self, changed: str = "") -> None:
        """Make the three ways to say what the classes are agree.

        Names that were given count before automatic ones (``LABEL_0``, ..), which may come from a copied configuration.
        """
        held = self.__dict__
        if type(held["num_labels"]) is not int:
            raise UserError(f"model.num_labels is {held['num_labels']!r}: give a whole number of 1 or more")
        try:
            by_number = {int(number): str(name) for number, name in (held["id2label"] or {}).items()}
            by_name = {int(number): str(name) for name, number in (held["label2id"] or {}).items()}
        except (AttributeError, TypeError, ValueError, RuntimeError):  # a tensor's truth is a RuntimeError
            raise UserError(
                f"model.id2label is {held['id2label']!r} and model.label2id {held['label2id']!r}: give a name for each "
                "class number, such as {0: 'no', 1: 'yes'}"
            ) from None
        if changed == "label2id" or (changed != "id2label" and _automatic(by_number) and by_name):
            names, others = by_name, by_number
        else:
            names, others = by_number, by_name
        if changed == "num_labels" or (not changed and held["num_labels"] and _automatic(names)):
            names = names if len(names) == held["num_labels"] else {}
        elif changed or _automatic(others):
            held["num_labels"] = len(names)
        held["num_labels"] = held["num_labels"] or len(names) or _CLASSES
        held["id2label"] = dict(sorted(names.items())) or _numbered(held["num_labels"])
        held["label2id"] = {name: number for number, name in held["id2label"].items()}

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
        """All fields that have a value, and the model type; plain values that JSON can hold.

        None stands where a field without a value would be read back as its default.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        kept = {field.name for field in fields(self) if field.default is not None}
        del values["num_labels"]  # their number is that of the names
        if values["layer_norm_placement"] == "pre":
            del values["layer_norm_placement"]  # MegatronBERT has no other, and no field for it
        stated = {name: value for name, value in values.items() if value is not None or name in kept}
        return {"model_type": self.model_type, **stated}

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, label: str = "the configuration", **changes: Any) -> Self:
        """A configuration from the contents of a config.json.

        Args:
            values: by field name; those that other frameworks write and that mean nothing here are skipped.
            label: what to call it in messages.
            **changes: fields that replace those of ``values``.

        Raises:
            UserError: another type of model, an unknown field, or a value that a field cannot have.
        """
        kind = values.get("model_type") or cls.model_type
        if kind != cls.model_type and kind not in cls.also_reads:
            raise UserError(f"{label} has model_type {str(kind)[:40]!r}: expected {cls.model_type}")
        known = {}
        for name, value in values.items():
            name = _ALIASES.get(name, name)
            if name in cls.__dataclass_fields__:
                known[name] = value
            elif name not in _WITHOUT_MEANING:
                what = f"field of {cls.__name__}, but {label} holds it"
                problem = unknown_name(name, cls.__dataclass_fields__, what)
                raise UserError(f"{problem}; take it out of the file if it changes no result of the model")
        if known.get("position_embedding_type", "") is None:  # some writers leave it to the default
            del known["position_embedding_type"]
        if isinstance(act := known.get("hidden_act"), str):
            known["hidden_act"] = GELU_SYNONYMS.get(act, act)
        if "num_labels" in changes and "id2label" not in changes:
            known.pop("id2label", None)
            known.pop("label2id", None)
        return cls(**(known | changes))

    @classmethod
    def from_pretrained(cls, directory: str | Path, **changes: Any) -> Self:
        """Read the config.json of a directory (or the file itself), with some fields changed.

        Raises:
            UserError: there is none, or it is of another model.
        """
        path = directory_path(directory)
        path = path / CONFIG_NAME if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"{directory} holds no {CONFIG_NAME}: give a directory with one; nothing is downloaded")
        return cls.from_dict(read_object(path), label=str(path), **changes)

    def save_pretrained(self, directory: str | Path, *, architecture: str | None = None) -> None:
        """Write config.json into a directory; ``architecture`` names the class of the weights beside it."""
        folder = made_directory(directory)
        values = self.to_dict() | ({"architectures": [architecture]} if architecture else {})
        (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


MegatronBertConfig = EncoderConfig
