# SPDX-License-Identifier: Apache-2.0
"""Names of Megatron's parameters: of its classic model code, in three generations, and of megatron-core's BertModel.

The same classic model was saved under three generations of names: ``transformer`` with ``attention`` and ``layernorm``;
from 2021 ``encoder`` with ``self_attention``; from 2023 with ``input_norm``, ``post_attention_norm``, ``final_norm``.
The norms of megatron-core are modules of their own (local layer specification) or parameters of the linear layers
behind them (Transformer Engine). Layers are numbered from 0 in every pipeline stage.
"""

from __future__ import annotations

import re

from megatron_bert.convert.name_table import NameTable

#: The last stage's copy of the word embeddings.
TIED = "output_embeddings.weight"
#: Megatron's heads of fine-tuning tasks, alike but for their names.
CLASSES, CHOICES = "classification_head", "multichoice_head"

_OUTER = re.compile(r"(?:(?:model|module)\.)*(?:language_model\.)?(?:(?:embedding|transformer|encoder)\.)?")
#: What the dictionaries of the classic model code's modules hold; around it they are nested.
_INNER = re.compile(r"\.((?:layers|final_layernorm|dense|layernorm)\..+|weight|bias)$")
_FUSED = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)


def _legacy(key: str) -> str:
    key = _OUTER.sub("", key, count=1).replace("self_attention.", "attention.").replace(CHOICES, CLASSES)
    return re.sub(r"(?<=[._])norm(?=\.)", "layernorm", key)


def _core(key: str) -> str:
    key = re.sub(r"^(?:(?:model|module)\.)+", "", key).replace(CHOICES, CLASSES)
    for with_layer, local in _FUSED:
        key = key.replace(with_layer, local)
    return key


LEGACY = NameTable(
    {
        "embeddings.word_embeddings": "language_model.embedding.word_embeddings",
        "embeddings.position_embeddings": "language_model.embedding.position_embeddings",
        "embeddings.token_type_embeddings": "language_model.embedding.tokentype_embeddings",
        "encoder.final_norm": "language_model.encoder.final_layernorm",
        "masked_head.dense": "lm_head.dense",
        "masked_head.norm": "lm_head.layernorm",
        "masked_head.bias": "lm_head.bias",
        "pair_head.pooler": "language_model.pooler.dense",
        "pair_head.classifier": "binary_head",
        "classifier": CLASSES,
        TIED: "word_embeddings_for_head.weight",
    },
    "language_model.encoder.layers",
    {
        "attention_norm": "input_layernorm",
        "attention.query_key_value": "self_attention.query_key_value",
        "attention.output": "self_attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.intermediate": "mlp.dense_h_to_4h",
        "mlp.output": "mlp.dense_4h_to_h",
    },
    _legacy,
)
CORE = NameTable(
    {
        "embeddings.word_embeddings": "embedding.word_embeddings",
        "embeddings.position_embeddings": "embedding.position_embeddings",
        "embeddings.token_type_embeddings": "embedding.tokentype_embeddings",
        "encoder.final_norm": "encoder.final_layernorm",
        "masked_head.dense": "lm_head.dense",
        "masked_head.norm": "lm_head.layer_norm",
        "masked_head.bias": "output_layer.bias",
        "pair_head.pooler": "pooler.dense",
        "pair_head.classifier": "binary_head",
        "classifier": CLASSES,
        TIED: "output_layer.weight",
    },
    "encoder.layers",
    {
        "attention_norm": "input_layernorm",
        "attention.query_key_value": "self_attention.linear_qkv",
        "attention.output": "self_attention.linear_proj",
        "mlp_norm": "pre_mlp_layernorm",
        "mlp.intermediate": "mlp.linear_fc1",
        "mlp.output": "mlp.linear_fc2",
    },
    _core,
)


def legacy_path(name: str, *, modern: bool) -> list[str]:
    """The keys of nested dictionaries under which the classic model code has a parameter, since 2021 or before."""
    (key,) = LEGACY.theirs(name)
    if not modern:
        key = key.replace("_model.encoder.", "_model.transformer.").replace("self_attention.", "attention.")
    inner = _INNER.search(key)
    assert inner is not None
    return [*key[: inner.start()].split("."), inner[1]]


def core_path(name: str, *, fused: bool) -> list[str]:
    """The key under which megatron-core has a parameter, its norms fused or not."""
    (key,) = CORE.theirs(name)
    for with_layer, local in _FUSED if fused else ():
        key = key.replace(local, with_layer)
    return [key]
