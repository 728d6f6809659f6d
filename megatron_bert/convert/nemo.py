# SPDX-License-Identifier: Apache-2.0
"""NeMo's packaging of Megatron's model: ``model_config.yaml`` and ``model_weights.ckpt``, in a tar file (``.nemo``).

The weights are a bare state dictionary with the names of Megatron's model code behind ``model.``; the settings take the
place of the run's arguments. Rows of query, key and value are ``[heads, 3, head_dim]``, or those of checkpoint
version 0 where the settings say ``megatron_legacy``.
"""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from megatron_bert.convert.files import FileTree
from parallel.errors import UserError, brief

NEMO_SETTINGS, NEMO_WEIGHTS = "model_config.yaml", "model_weights.ckpt"
_LONGEST = 1 << 20
#: Settings of the architecture, and the only value that is Megatron's BERT.
_ARCHITECTURE = {"transformer_block_type": "pre_ln", "normalization": "layernorm", "activation": "gelu"}
#: Numbers with the name and meaning of Megatron's arguments.
_NUMBERS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "max_position_embeddings"),
    *("layernorm_epsilon", "hidden_dropout", "attention_dropout", "init_method_std"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "openai_gelu"),
)


def nemo_settings(tree: FileTree) -> dict[str, Any] | None:
    """The settings of a tree in NeMo's packaging, as ``args`` and ``checkpoint_version`` of a shard; None without them.

    Raises:
        UserError: they are damaged, or are of a model that Megatron's BERT is not.
    """
    names = [name for name in tree if name == NEMO_SETTINGS or name.endswith("/" + NEMO_SETTINGS)]
    if len(names) != 1:
        return None
    settings = _read(tree, names[0])
    label = f"{tree.label}/{names[0]}"
    target = str(settings.get("target", "bert"))
    if "bert" not in target.lower():
        raise UserError(f"{label} is of {brief(target)}: only Megatron's BERT can be converted")
    for key, usual in _ARCHITECTURE.items():
        value = settings.get(key)
        if value is not None and str(value).lower() != usual:
            raise UserError(f"{label} has {key} {brief(value)}: only {usual}, as Megatron's BERT has, can be converted")
    # Interpolations that were not resolved are texts, and count as not stored.
    args = {key: settings[key] for key in _NUMBERS if isinstance(settings.get(key), (int, float))}
    if isinstance(positions := settings.get("position_embedding_type"), (int, float, str)):
        args["position_embedding_type"] = positions
    # The default of NeMo's code, where the file leaves it out.
    args["bias_gelu_fusion"] = settings.get("bias_gelu_fusion", True) is not False
    version = 0.0 if settings.get("megatron_legacy") is True else 3.0
    return {"args": argparse.Namespace(**args), "checkpoint_version": version}


def _read(tree: FileTree, name: str) -> dict[str, Any]:
    place = tree[name]
    if place.length > _LONGEST:
        raise UserError(f"{place.label} has {place.length:,} bytes, far too many for a file of settings: wrong file?")
    try:
        text = place.content().decode("utf-8")
        # A few lines of aliases can stand for more than any memory holds.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise yaml.YAMLError("an alias")
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{place.label} is not YAML ({brief(error, 80)}): fetch it again") from None
    if not isinstance(settings, dict):
        raise UserError(f"{place.label} holds no settings: fetch it again")
    return settings
