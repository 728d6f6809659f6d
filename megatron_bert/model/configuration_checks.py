# SPDX-License-Identifier: Apache-2.0
"""What values a configuration may have."""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import index
from typing import Any

from parallel.errors import ArgumentError

POSITION_TYPES = ("absolute", "relative_key", "relative_key_query")
LAYER_NORM_PLACEMENTS = ("pre", "post")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
#: torch_dtype names.
NUMBER_FORMATS = ("float32", "float16", "bfloat16", "float64")

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "vocab_size_multiple",
)
_SWITCHES = (
    "is_decoder",
    "add_cross_attention",
    "tie_word_embeddings",
    "scaled_output_init",
    "binary_head",
)
_NOT_NEGATIVE = ("initializer_range", "layer_norm_eps")
_PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


def bounds(name: str) -> dict[str, int]:
    """The bounds of a number, as pydantic names them; {} for fields without."""
    if name in _POSITIVE:
        return {"ge": 1}
    return {"ge": 0, "lt": 1} if name in _PROBABILITIES else {"ge": 0} if name in _NOT_NEGATIVE else {}


def check_values(config: Any, activations: Iterable[str]) -> None:
    """Check every field of a configuration.

    Raises:
        UserError: for the first that is wrong, with what it may be.
    """
    for name in _POSITIVE:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise ArgumentError(f"${name} is {value!r}: give a whole number of 1 or more")
    for name in _SWITCHES:
        check_switch(name, getattr(config, name))
    for name in _PROBABILITIES:
        value = getattr(config, name)
        if not (value is None and name == "classifier_dropout") and not (is_number(value) and 0 <= value < 1):
            raise ArgumentError(f"${name} is {value!r}: give a probability, at least 0 and below 1")
    for name in _NOT_NEGATIVE:
        value = getattr(config, name)
        if not is_number(value) or not 0 <= value < math.inf:
            raise ArgumentError(f"${name} is {value!r}: give a number of 0 or more")
    if config.hidden_size % config.num_attention_heads:
        raise ArgumentError(
            f"$hidden_size {config.hidden_size} is not a multiple of $num_attention_heads "
            f"{config.num_attention_heads}: every head needs the same number of dimensions"
        )
    check_choice("hidden_act", config.hidden_act, tuple(activations))
    check_choice("position_embedding_type", config.position_embedding_type, POSITION_TYPES)
    check_choice("layer_norm_placement", config.layer_norm_placement, LAYER_NORM_PLACEMENTS)
    check_choice("problem_type", config.problem_type, (None, *PROBLEM_TYPES))
    if config.add_cross_attention and not config.is_decoder:
        raise ArgumentError("$add_cross_attention needs $is_decoder=true: only decoders attend to an encoder")
    _check_ids(config)
    _check_labels(config)
    _check_pruned(config)


def is_number(value: Any) -> bool:
    """Whether a value is a number, which true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_switch(name: str, value: Any) -> None:
    """Refuse (UserError) what is neither true nor false."""
    if type(value) is not bool:
        raise ArgumentError(f"${name} is {value!r}: give true or false")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse (UserError) what is not one of some choices."""
    if not isinstance(value, str | None) or value not in choices:
        names = ", ".join(str(choice) for choice in choices if choice is not None)
        raise ArgumentError(f"${name} is {value!r}: choose one of {names}")


def _check_ids(config: Any) -> None:
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for name, value in (("pad", config.pad_token_id), ("bos", config.bos_token_id), *(("eos", end) for end in ends)):
        if value is None:
            continue
        if type(value) is not int or value < 0:
            raise ArgumentError(f"${name}_token_id is {value!r}: give the id of a token")
        if value >= config.vocab_size:
            raise ArgumentError(
                f"${name}_token_id is {value}, but $vocab_size {config.vocab_size} has ids to "
                f"{config.vocab_size - 1}: give the id of a token in the vocabulary, or none"
            )


def _check_labels(config: Any) -> None:
    numbers, names = list(config.id2label), list(config.id2label.values())
    if numbers != list(range(len(numbers))) or len(set(names)) != len(names):
        raise ArgumentError(
            f"$id2label numbers its {len(numbers)} classes {numbers[:5]}..: number them from 0, each with a name "
            "of its own"
        )


def _check_pruned(config: Any) -> None:
    """Check the heads, and write them as plain sorted lists: JSON makes the layers' numbers text."""
    if config.pruned_heads is None:
        return
    try:
        pruned = {int(layer): sorted({index(head) for head in heads}) for layer, heads in config.pruned_heads.items()}
    except (AttributeError, TypeError, ValueError):
        raise ArgumentError(
            f"$pruned_heads is {config.pruned_heads!r}: give numbers of heads by number of layer, such as {{0: [1, 2]}}"
        ) from None
    for layer, heads in pruned.items():
        fits = all(0 <= head < config.num_attention_heads for head in heads)
        if not 0 <= layer < config.num_hidden_layers or not fits or len(heads) == config.num_attention_heads:
            raise ArgumentError(
                f"$pruned_heads has {heads} for layer {layer}: layers go to {config.num_hidden_layers - 1}, heads "
                f"to {config.num_attention_heads - 1}, and each layer keeps at least one"
            )
    config.__dict__["pruned_heads"] = {layer: heads for layer, heads in sorted(pruned.items()) if heads} or None
