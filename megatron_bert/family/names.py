# SPDX-License-Identifier: Apache-2.0
"""Parameter names: those of pretraining checkpoints, and of transformers' classes, which the documented classes have.

| pretraining, and tasks    | transformers' MegatronBert                         |
|---------------------------|----------------------------------------------------|
| embeddings.., encoder..   | bert.embeddings.., bert.encoder.layer..            |
| pair_head.pooler          | bert.pooler.dense                                  |
| pair_head.classifier      | cls.seq_relationship                               |
| masked_head               | cls.predictions                                    |
| classifier, qa_outputs    | the same                                           |
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_bert.convert.huggingface_names import their_names
from megatron_bert.model.task_heads.table import head_layers

#: Modules outside of layers, and in them, that some class has.
_OUTSIDE = (
    "embeddings.word_embeddings",
    "embeddings.position_embeddings",
    "embeddings.token_type_embeddings",
    "embeddings.norm",
    "encoder.final_norm",
    "pair_head.pooler",
    "pair_head.classifier",
    "masked_head.dense",
    "masked_head.norm",
    "masked_head",
    "output_embeddings",
)
_IN_LAYER = (
    "attention_norm",
    "attention.query_key_value",
    "attention.output",
    "attention.distance",
    "cross_attention_norm",
    "cross_attention.query",
    "cross_attention.key_value",
    "cross_attention.output",
    "cross_attention.distance",
    "mlp_norm",
    "mlp.intermediate",
    "mlp.output",
)
#: Parts of the encoder, which stand in front of the names in classes without a head.
_ENCODER = ("embeddings", "encoder", "pooler")


class Place(NamedTuple):
    """Where the parameters of a module of transformers' are in a pretraining checkpoint.

    Attributes:
        owner: the module there.
        part, parts: which of how many projections of a fused matrix they are.
    """

    owner: str
    part: int
    parts: int


@dataclass(frozen=True, eq=False)
class Names:
    """The names of one family of classes.

    Attributes:
        prefix: the encoder's name in classes with a head, here and in transformers.
        outside_layers: owner of a parameter -> owner in transformers, where MegatronBert's pretraining model has none
            or another.
        in_layers: the same inside a layer; several for a fused matrix.
        quantization: last parts of buffers of transformers' quantized layers.
        aliases: names of the encoder in other families of transformers whose weights are the same.
        like_roberta: which layers the heads of tasks have; their names are the same here and there.
    """

    prefix: str
    outside_layers: Mapping[str, str]
    in_layers: Mapping[str, tuple[str, ...]]
    quantization: frozenset[str] = frozenset()
    aliases: tuple[str, ...] = ()
    like_roberta: bool = False

    def theirs(self, name: str) -> tuple[str, ...]:
        """The name in transformers' classes with a head of a parameter of a pretraining checkpoint, or of a task's.

        Several for a fused matrix.
        """
        owner, _, kind = name.rpartition(".")
        if owner in self.outside_layers:
            return (f"{self.outside_layers[owner]}.{kind}",)
        if owner in head_layers(like_roberta=self.like_roberta):
            return (name,)
        if owner.startswith("encoder.layers."):
            _, _, number, part = owner.split(".", 3)
            if part in self.in_layers:
                return tuple(f"{self.prefix}.encoder.layer.{number}.{theirs}.{kind}" for theirs in self.in_layers[part])
        return tuple(
            f"{self.prefix}.{key.removeprefix('bert.')}" if key.startswith("bert.") else key
            for key in their_names(name)
        )

    def places(self, layers: int) -> dict[str, Place]:
        """Module in transformers' classes with a head -> where its parameters are in a pretraining checkpoint."""
        return _places(self, layers, head_layers(like_roberta=self.like_roberta))

    def with_prefix(self, key: str) -> str:
        """A key of any of transformers' classes as those with a head have it."""
        first, _, rest = key.partition(".")
        if first in self.aliases:
            return f"{self.prefix}.{rest}"
        return f"{self.prefix}.{key}" if first in _ENCODER else key

    def of_quantization(self, key: str) -> bool:
        """Whether a key is a buffer of transformers' quantized layers."""
        return key.rpartition(".")[2] in self.quantization


MEGATRON_BERT = Names(
    prefix="bert",
    outside_layers={
        "output_embeddings": "cls.predictions.decoder",
    },
    # Parts of a layer that a pretraining encoder does not have.
    in_layers={
        "attention.distance": ("attention.self.distance_embedding",),
        "cross_attention_norm": ("crossattention.ln",),
        "cross_attention.query": ("crossattention.self.query",),
        "cross_attention.key_value": ("crossattention.self.key", "crossattention.self.value"),
        "cross_attention.output": ("crossattention.output.dense",),
        "cross_attention.distance": ("crossattention.self.distance_embedding",),
    },
)

#: Of transformers' Bert, whose norms come after the sums.
BERT = Names(
    prefix="bert",
    outside_layers={
        "embeddings.norm": "bert.embeddings.LayerNorm",
    },
    in_layers={
        "attention_norm": ("attention.output.LayerNorm",),
        "mlp_norm": ("output.LayerNorm",),
    },
)


def separate(tensor: Tensor, parts: int, head_dim: int) -> tuple[Tensor, ...]:
    """The ``parts`` projections of a fused matrix (or bias) with rows ``[heads, parts, head_dim]``."""
    if parts == 1:
        return (tensor,)
    by_head = tensor.unflatten(0, (-1, parts, head_dim))
    return tuple(by_head[:, index].flatten(0, 1) for index in range(parts))


def fuse(tensors: list[Tensor], head_dim: int) -> Tensor:
    """The inverse of :func:`separate`."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.stack([tensor.unflatten(0, (-1, head_dim)) for tensor in tensors], dim=1).flatten(0, 2)


@functools.cache
def _places(names: Names, layers: int, heads: frozenset[str]) -> dict[str, Place]:
    owners = [
        *_OUTSIDE,
        *sorted(heads),
        *(f"encoder.layers.{number}.{part}" for number in range(layers) for part in _IN_LAYER),
    ]
    found: dict[str, Place] = {}
    for owner in owners:
        try:
            theirs = names.theirs(f"{owner}.weight")
        except KeyError:  # of another family
            continue
        for index, name in enumerate(theirs):
            found[name.removesuffix(".weight")] = Place(owner, index, len(theirs))
    for number in range(layers):  # of quantized layers, which hold ranges
        found[f"{names.prefix}.encoder.layer.{number}"] = Place(f"encoder.layers.{number}", 0, 1)
    found[f"{names.prefix}.embeddings"] = Place("embeddings", 0, 1)
    return found
