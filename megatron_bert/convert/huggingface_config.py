# SPDX-License-Identifier: Apache-2.0
"""config.json of Hugging Face's checkpoints: what it says of a model, and what is written of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bert.convert.huggingface_names import IBERT, MEGATRON_BERT, MODEL_TYPES, HuggingFaceNames, family_of
from megatron_bert.convert.megatron_config import true_vocab_size
from megatron_bert.convert.options import GELU_NAMES, ReadOptions
from megatron_bert.convert.state import SIZES, CanonicalState, StateTensor, classes_of
from megatron_bert.model.activations import GELU_SYNONYMS
from megatron_bert.model.configuration import MODEL_TYPE, MegatronBertConfig, config_from_dict, named_labels
from megatron_bert.model.task_heads.table import HEADS
from parallel.errors import UserError, brief

#: Fields of a config.json without which nothing is known of a model.
_NEEDED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "max_position_embeddings",
)
_OF_HEADS = ("classifier_dropout", "problem_type")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def family_in(
    settings: dict[str, Any], label: str, stored: Mapping[str, StateTensor]
) -> tuple[HuggingFaceNames, list[str]]:
    """The family that the settings name, where it is an encoder of a kind that is read; and what was assumed for it."""
    kind, assumed = settings.get("model_type"), []
    if kind is None and any(".attention.ln." in key for key in stored):
        kind = MODEL_TYPE
        assumed.append(f"{label} gives no model_type: {MODEL_TYPE} was taken, for the norms that its weights have")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        given = "gives no model_type" if kind is None else f"has model_type {brief(kind)!r}"
        raise UserError(
            f"{label} {given}: expected {MODEL_TYPE}, {', '.join(sorted(MODEL_TYPES.keys() - {MODEL_TYPE}))}"
        )
    if settings.get("position_embedding_type") not in (None, "absolute"):
        raise UserError(
            f"{label} has relative position embeddings (position_embedding_type "
            f"{brief(settings['position_embedding_type'])}): only absolute ones can be read"
        )
    for name in ("is_decoder", "add_cross_attention"):
        if settings.get(name):
            raise UserError(f"{label} is of a decoder ({name}): only encoders can be read")
    if settings.get("pruned_heads"):
        raise UserError(f"{label} says that attention heads were pruned: only whole models can be read")
    return MODEL_TYPES[kind], assumed


def architecture_in(settings: dict[str, Any]) -> str | None:
    """The class that the settings name."""
    named = settings.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else None


def config_in(
    settings: dict[str, Any],
    label: str,
    family: HuggingFaceNames,
    rows: int | None,
    named: Mapping[str, StateTensor],
    options: ReadOptions,
) -> tuple[MegatronBertConfig, int | None, list[str]]:
    """The configuration, the number of words if it is known, and what was assumed.

    Args:
        rows: of the embedding table; None where there are no weights.
        named: the weights, by canonical name.

    Raises:
        UserError: the file is damaged, or its settings are not those of the weights.
    """
    if missing := [name for name in _NEEDED if settings.get(name) is None]:
        raise UserError(f"{label} gives no {missing[0]}: it is damaged or of another kind of model")
    values = {name: settings[name] for name in (*SIZES, *_OF_HEADS) if settings.get(name) is not None}
    if rows not in (None, values["vocab_size"]):
        raise UserError(
            f"{label} says vocab_size {brief(repr(values['vocab_size']))}, but there are {rows} rows of word "
            "embeddings: settings and weights are of two models"
        )
    words = None if rows is None else true_vocab_size(label, rows, None, options)
    activation = GELU_NAMES[options.gelu] if options.gelu else brief(values.get("hidden_act", "gelu"), 40)
    values |= {
        "model_type": family.config.model_type,
        "vocab_size": words or values["vocab_size"],
        "num_attention_heads": options.num_attention_heads or values["num_attention_heads"],
        "layer_norm_eps": options.layer_norm_eps or values.get("layer_norm_eps", 1e-12),
        "hidden_act": GELU_SYNONYMS.get(activation, activation),
        "binary_head": "pair_head.classifier.weight" in named,
        "id2label": _classes(settings, label, named),
    }
    values |= {key: _token(settings, key, values["vocab_size"], family.config) for key in _TOKENS}
    config = config_from_dict(values, label)
    assumptions = []
    if config.layer_norm_eps == 1e-12 and family is MEGATRON_BERT:
        assumptions.append(
            "the stored layer_norm_eps 1e-12 is the default of transformers, whose converter never set Megatron's "
            "1e-5: give --layer-norm-eps 1e-5 if the model was trained by Megatron"
        )
    return config, words, assumptions


def _token(settings: dict[str, Any], key: str, words: Any, family: type[MegatronBertConfig]) -> Any:
    usual = getattr(family, key)
    value = settings.get(key, usual)
    ids = value if key == "eos_token_id" and isinstance(value, list) else [value]
    known = all(type(number) is int and type(words) is int and 0 <= number < words for number in ids)
    return value if value is None or (ids and known) else usual


def _classes(settings: dict[str, Any], label: str, named: Mapping[str, StateTensor]) -> dict[int, str]:
    """The names of classes; their number by the weights where the settings say nothing of them."""
    by_number, by_name = settings.get("id2label"), settings.get("label2id")
    count = None if by_number or by_name else classes_of(named)
    try:
        return named_labels(by_number, by_name, count)
    except UserError as error:
        raise UserError(f"id2label in {label} is damaged ({brief(error, 200)}): copy the model again") from None


def their_config(state: CanonicalState) -> dict[str, Any]:
    """What config.json says of a model."""
    config, family = state.config, family_of(state.config)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
    classes: dict[str, Any] = {}
    if state.head is not None:
        classes = {
            "id2label": {str(number): name for number, name in (config.id2label or {}).items()},
            "label2id": {name: number for number, name in (config.id2label or {}).items()},
            "problem_type": config.problem_type,
            "classifier_dropout": config.classifier_dropout,
        }
    quantized = {}
    if family is IBERT and state.ranges is not None:
        quantized = {"quant_mode": True, "force_dequant": state.ranges.settings.get("force_dequant", "none")}
    return {
        "architectures": [family.classes + class_ending(state)],
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in SIZES},
        **{name: value for name in ("bos_token_id", "eos_token_id") if (value := getattr(config, name)) is not None},
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        **classes,
        **quantized,
        **({"torch_dtype": dtypes.pop()} if len(dtypes) == 1 else {}),
    }


def class_ending(state: CanonicalState) -> str:
    """What the name of the class ends in that has just these weights."""
    if state.head is not None:
        return HEADS[state.head].class_ending
    if state.has_masked_head:
        return "ForPreTraining" if state.has_pair_head else "ForMaskedLM"
    return "ForNextSentencePrediction" if state.has_pair_head else "Model"
