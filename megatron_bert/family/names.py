"""Parameter names: those of these classes, of pretraining checkpoints, and of transformers' classes.

| here (with a head)             | pretraining               | transformers' MegatronBert                         |
|--------------------------------|---------------------------|----------------------------------------------------|
| bert.embeddings.., bert.encoder.. | embeddings.., encoder.. | bert.embeddings.., bert.encoder.layer..            |
| bert.pooler                    | pair_head.pooler          | bert.pooler.dense                                  |
| pair_classifier                | pair_head.classifier      | cls.seq_relationship                               |
| masked_head                    | masked_head               | cls.predictions                                    |
| output_embeddings              | (tied)                    | cls.predictions.decoder                            |
| classifier, qa_outputs         |                           | the same                                           |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bert.convert.huggingface_names import their_names

_RENAMED = {"pooler.": "pair_head.pooler.", "pair_classifier.": "pair_head.classifier."}
#: Parts of the encoder, which stand in front of the names in classes without a head.
_ENCODER = ("embeddings", "encoder", "pooler")


@dataclass(frozen=True)
class Names:
    """The names of one family of classes.

    Attributes:
        prefix: the encoder's name in classes with a head, here and in transformers.
        outside_layers: owner of a parameter -> owner in transformers, where MegatronBert's pretraining model has none
            or another.
        in_layers: the same inside a layer; several for a fused matrix.
        output: transformers' owner of the language-model head's bias; the output matrix is in its ``decoder``.
        quantization: last parts of buffers of transformers' quantised layers.
        aliases: names of the encoder in other families of transformers whose weights are the same.
    """

    prefix: str
    outside_layers: Mapping[str, str]
    in_layers: Mapping[str, tuple[str, ...]]
    output: str
    quantization: frozenset[str] = frozenset()
    aliases: tuple[str, ...] = ()

    @property
    def output_bias(self) -> str:
        """The bias of the language-model head."""
        return f"{self.output}.bias"

    @property
    def output_bias_copy(self) -> str:
        """Its second name, which counts where the head is not tied."""
        return f"{self.output}.decoder.bias"

    @property
    def output_matrix(self) -> str:
        """The language-model head's matrix."""
        return f"{self.output}.decoder.weight"

    def canonical(self, name: str) -> str:
        """The name in a pretraining checkpoint of a parameter (or of a module, with a dot at the end)."""
        name = name.removeprefix(f"{self.prefix}.")
        for ours, canonical in _RENAMED.items():
            if name.startswith(ours):
                return canonical + name.removeprefix(ours)
        return name

    def theirs(self, name: str) -> tuple[str, ...]:
        """The name of a parameter in transformers' classes with a head; several for a fused matrix."""
        name = self.canonical(name)
        owner, _, kind = name.rpartition(".")
        if owner in self.outside_layers:
            return (f"{self.outside_layers[owner]}.{kind}",)
        if owner.startswith("encoder.layers."):
            _, _, number, part = owner.split(".", 3)
            if part in self.in_layers:
                return tuple(f"{self.prefix}.encoder.layer.{number}.{theirs}.{kind}" for theirs in self.in_layers[part])
        return tuple(
            f"{self.prefix}.{key.removeprefix('bert.')}" if key.startswith("bert.") else key
            for key in their_names(name)
        )

    def with_prefix(self, key: str) -> str:
        """A key of any of transformers' classes as those with a head have it."""
        first, _, rest = key.partition(".")
        if first in self.aliases:
            return f"{self.prefix}.{rest}"
        return f"{self.prefix}.{key}" if first in _ENCODER else key

    def of_quantization(self, key: str) -> bool:
        """Whether a key is a buffer of transformers' quantised layers."""
        return key.rpartition(".")[2] in self.quantization


MEGATRON_BERT = Names(
    prefix="bert",
    outside_layers={
        "output_embeddings": "cls.predictions.decoder",
        "classifier": "classifier",
        "qa_outputs": "qa_outputs",
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
    output="cls.predictions",
)

#: Of transformers' Bert, whose norms come after the sums.
BERT = Names(
    prefix="bert",
    outside_layers={
        "embeddings.norm": "bert.embeddings.LayerNorm",
        "classifier": "classifier",
        "qa_outputs": "qa_outputs",
    },
    in_layers={
        "attention_norm": ("attention.output.LayerNorm",),
        "mlp_norm": ("output.LayerNorm",),
    },
    output="cls.predictions",
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
