# SPDX-License-Identifier: Apache-2.0
"""The encoder's configuration from what a Megatron checkpoint stores: shapes, and the run's arguments if they speak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bert.convert.megatron_shards import Checkpoint
from megatron_bert.convert.options import GELU_NAMES, ReadOptions
from megatron_bert.convert.state import TOKEN_TYPES, VOCABULARY_BIAS, WORD_EMBEDDINGS
from megatron_bert.model.configuration import MegatronBertConfig, numbered_labels
from parallel.errors import UserError

#: Dimensions of a head in every BERT that Megatron's papers and NGC have.
_USUAL_HEAD_DIM = 64
_DEFAULT_EPS = 1e-5
#: Arguments that ask for another architecture, and the only value that is this one.
_ARCHITECTURE = {
    "apply_residual_connection_post_layernorm": (False, "a post-layer-norm model"),
    "swiglu": (False, "a model with SwiGLU"),
    "normalization": ("LayerNorm", "a model with another norm"),
    "position_embedding_type": ("learned_absolute", "a model with other position embeddings"),
    "num_experts": (None, "a mixture of experts"),
    "untie_embeddings_and_output_weights": (False, "a model with an output matrix of its own"),
    "squared_relu": (False, "a model with squared ReLU"),
    "quick_geglu": (False, "a model with gated GELU"),
    "apply_layernorm_1p": (False, "a model whose norm weights are stored minus one"),
}


def encoder_config(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], options: ReadOptions
) -> tuple[MegatronBertConfig, int | None, list[str]]:
    """Configuration, number of words if known, and what was assumed.

    Args:
        checkpoint: opened.
        shapes: canonical name -> shape of the whole tensor, with padding.
        options: of the user, which count more.

    Raises:
        UserError: sizes contradict each other, or the architecture is another.
    """
    label, args = checkpoint.first.label, checkpoint.first.args
    assumptions: list[str] = []
    for key, (usual, what) in _ARCHITECTURE.items():
        if key in args and args[key] != usual and args[key] is not None:
            raise UserError(f"{label} is of {what} ({key}): only Megatron's pre-layer-norm BERT can be converted")
    sizes = _sizes(label, shapes)
    _check_against_args(label, args, sizes, shapes)
    heads = options.num_attention_heads or _integer(label, args, "num_attention_heads")
    hidden = sizes["hidden_size"]
    if heads is None:
        heads = max(1, hidden // _USUAL_HEAD_DIM)
        assumptions.append(
            f"the number of attention heads is not stored: {heads} were taken, of {hidden // heads} each"
        )
    if heads < 1 or hidden % heads or heads % checkpoint.tensor:
        raise UserError(
            f"{label} has a hidden size of {hidden} at tensor size {checkpoint.tensor}, which {heads} attention heads "
            "do not fit: give the right number with --num-attention-heads"
        )
    channels = _integer(label, args, "kv_channels")
    if channels is not None and channels * heads != hidden:
        raise UserError(f"{label} has {heads} heads of {channels} in a hidden size of {hidden}: cannot be converted")
    rows = shapes[WORD_EMBEDDINGS][0]
    words = true_vocab_size(label, rows, _integer(label, args, "vocab_size"), options)
    config = MegatronBertConfig(
        **sizes,  # type: ignore[arg-type]
        num_attention_heads=heads,
        vocab_size=words or rows,
        layer_norm_eps=_eps(args, options, assumptions),
        hidden_act=_activation(args, options, assumptions),
        hidden_dropout_prob=_fraction(args, "hidden_dropout", 0.1),
        attention_probs_dropout_prob=_fraction(args, "attention_dropout", 0.1),
        initializer_range=_fraction(args, "init_method_std", 0.02),
        binary_head="pair_head.classifier.weight" in shapes,
        id2label=numbered_labels(max(1, shapes["classifier.bias"][0])) if shapes.get("classifier.bias") else None,
    )
    return config, words, assumptions


def true_vocab_size(label: str, rows: int, stored: int | None, options: ReadOptions) -> int | None:
    """The number of words, by the user's or the source's word; None if neither knows.

    Raises:
        UserError: the user's is above the rows that there are.
    """
    if options.true_vocab_size is not None:
        if options.true_vocab_size > rows:
            raise UserError(
                f"--true-vocab-size is {options.true_vocab_size}, but {label} holds {rows} words: give {rows} or less"
            )
        return options.true_vocab_size
    return stored if stored is not None and 0 < stored <= rows else None


def _sizes(label: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    layers = {int(name.split(".")[2]) for name in shapes if name.startswith("encoder.layers.")}
    needed = {
        WORD_EMBEDDINGS: 2,
        "embeddings.position_embeddings.weight": 2,
        "encoder.layers.0.mlp.intermediate.weight": 2,
        **({TOKEN_TYPES: 2} if TOKEN_TYPES in shapes else {}),
        **({VOCABULARY_BIAS: 1} if VOCABULARY_BIAS in shapes else {}),
    }
    for name, dimensions in needed.items():
        if len(shapes.get(name, ())) != dimensions or 0 in shapes[name]:
            raise UserError(f"{label} holds no usable {name}: it is not a whole BERT model of Megatron")
    rows, hidden = shapes[WORD_EMBEDDINGS]
    biases = shapes.get(VOCABULARY_BIAS, (rows,))[0]
    if rows != biases:
        raise UserError(
            f"{label} has {rows} rows of word embeddings but {biases} vocabulary biases: one was resized without the "
            "other; repair it where it was written"
        )
    return {
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "intermediate_size": shapes["encoder.layers.0.mlp.intermediate.weight"][0],
        "max_position_embeddings": shapes["embeddings.position_embeddings.weight"][0],
        "type_vocab_size": shapes[TOKEN_TYPES][0] if TOKEN_TYPES in shapes else 2,
    }


def _check_against_args(
    label: str, args: Mapping[str, Any], sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for key, found in (
        ("num_layers", sizes["num_hidden_layers"]),
        ("hidden_size", sizes["hidden_size"]),
        ("ffn_hidden_size", sizes["intermediate_size"]),
        ("max_position_embeddings", sizes["max_position_embeddings"]),
        ("padded_vocab_size", shapes[WORD_EMBEDDINGS][0]),
    ):
        said = _integer(label, args, key)
        if said is not None and said != found:
            raise UserError(
                f"{label} says {key} {said}, but its tensors make it {found}: a stage or shard is missing, "
                "or files of two checkpoints are mixed"
            )


def _integer(label: str, args: Mapping[str, Any], key: str) -> int | None:
    value = args.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 40:
        raise UserError(f"{label} has an argument {key} that is not a sensible number: it is damaged")
    return value


def _fraction(args: Mapping[str, Any], key: str, usual: float) -> float:
    value = args.get(key)
    return float(value) if isinstance(value, (int, float)) and 0 <= value < 1 else usual


def _eps(args: Mapping[str, Any], options: ReadOptions, assumptions: list[str]) -> float:
    if options.layer_norm_eps is not None:
        return options.layer_norm_eps
    for key in ("layernorm_epsilon", "norm_epsilon"):
        value = args.get(key)
        if isinstance(value, float) and 0 < value < 1:
            return value
    assumptions.append(f"the epsilon of the layer norms is not stored: {_DEFAULT_EPS} was taken, Megatron's default")
    return _DEFAULT_EPS


def _activation(args: Mapping[str, Any], options: ReadOptions, assumptions: list[str]) -> str:
    """hidden_act. Megatron's fused bias and GELU, its default since 2.0, is the tanh approximation."""
    if options.gelu is not None:
        return GELU_NAMES[options.gelu]
    if args.get("openai_gelu") is True:
        return GELU_NAMES["tanh"]
    if args.get("bias_gelu_fusion") is True:
        assumptions.append(
            "the run used Megatron's fused GELU, the tanh approximation, in its layers and the exact one in the "
            "masked-language head: tanh was taken for both (they differ by less than 5e-4)"
        )
        return GELU_NAMES["tanh"]
    if not args:
        assumptions.append(
            "the kind of GELU is not stored: the exact one (erf) was taken; weights of early 2020 may have been "
            "trained with --gelu tanh"
        )
    return GELU_NAMES["erf"]
