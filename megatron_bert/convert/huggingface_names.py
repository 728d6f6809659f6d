# SPDX-License-Identifier: Apache-2.0
"""Names of transformers' classes of a family, in files and in modules, and separate projections from a fused matrix.

| here                                | transformers'                                                            |
|-------------------------------------|--------------------------------------------------------------------------|
| embeddings.., encoder.layers..      | the same, and encoder.layer.., behind the name of the encoder            |
| embeddings.norm, encoder.final_norm | embeddings.LayerNorm, encoder.ln                                         |
| attention_norm, mlp_norm            | attention.ln, ln; post-norm attention.output.LayerNorm, output.LayerNorm |
| pair_head.pooler, .classifier       | pooler.dense, cls.seq_relationship                                       |
| masked_head                         | cls.predictions; RoBERTa's lm_head                                       |
| classifier, qa_outputs              | the same                                                                 |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_bert.convert.state import QUERY_KEY_VALUE
from megatron_bert.model.task_heads.table import head_layers


class Place(NamedTuple):
    """Where the parameters of one of their modules are here.

    Attributes:
        owner: the module.
        part, parts: which of how many projections of a fused matrix they are.
    """

    owner: str
    part: int = 0
    parts: int = 1


#: Module here -> theirs, behind the name of the encoder; several for a fused matrix.
_ENCODER = {
    "embeddings": "embeddings",
    "embeddings.word_embeddings": "embeddings.word_embeddings",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
    "pair_head.pooler": "pooler.dense",
}
_LAYER = {
    "": ("",),
    QUERY_KEY_VALUE: ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output": ("attention.output.dense",),
    "mlp.intermediate": ("intermediate.dense",),
    "mlp.output": ("output.dense",),
}
_PRETRAINING = {
    "masked_head.dense": "cls.predictions.transform.dense",
    "masked_head.norm": "cls.predictions.transform.LayerNorm",
    "masked_head": "cls.predictions",
    "output_embeddings": "cls.predictions.decoder",
    "pair_head.classifier": "cls.seq_relationship",
}
_POST_NORM = {"attention_norm": ("attention.output.LayerNorm",), "mlp_norm": ("output.LayerNorm",)}
#: What DataParallel and torch.compile put before the names of a model's tensors.
WRAPPERS = r"^(?:module\.|_orig_mod\.)+"
_IN_LAYER = re.compile(r"encoder\.layer\.(\d{1,6})(?:\.(.+))?")


class HuggingFaceNames:
    """The names of one family of classes.

    Args:
        prefix: the encoder's name in classes with a head.
        encoder: module here -> theirs, behind the prefix, beyond what all families have.
        layer: the same inside a layer.
        heads: the same, without a prefix; heads of tasks have their names here.
        like_roberta: which layers those have.
        aliases: names of the encoder in other families whose weights are the same.
        buffers: last parts of the names of buffers that quantized layers have.
    """

    def __init__(
        self,
        prefix: str,
        *,
        encoder: Mapping[str, str],
        layer: Mapping[str, tuple[str, ...]],
        heads: Mapping[str, str],
        like_roberta: bool = False,
        aliases: tuple[str, ...] = (),
        buffers: frozenset[str] = frozenset(),
    ) -> None:
        self.prefix, self.aliases, self.buffers = prefix, aliases, buffers
        self._encoder, self._layer, self._heads = _ENCODER | dict(encoder), _LAYER | dict(layer), dict(heads)
        self._like_roberta = like_roberta
        self._ours = {theirs: Place(ours) for ours, theirs in (self._encoder | self._heads).items()}
        self._in_layer = {
            theirs: Place(ours, part, len(several))
            for ours, several in self._layer.items()
            for part, theirs in enumerate(several)
        }
        decoder = self._heads["output_embeddings"]
        #: Copies of other tensors under names of their own: key -> canonical name.
        self.copies = {f"{decoder}.weight": "embeddings.word_embeddings.weight", f"{decoder}.bias": "masked_head.bias"}

    def theirs(self, name: str) -> tuple[str, ...]:
        """Their name, in classes with a head, for a canonical one: several for a fused matrix.

        Raises:
            KeyError: no class of the family has it.
        """
        owner, _, kind = name.rpartition(".")
        if owner in self._heads:
            return (f"{self._heads[owner]}.{kind}",)
        if owner in self._encoder:
            return (f"{self.prefix}.{self._encoder[owner]}.{kind}",)
        if owner in head_layers(like_roberta=self._like_roberta):
            return (name,)
        if not owner.startswith("encoder.layers."):
            raise KeyError(owner)
        _, _, number, part = owner.split(".", 3)
        return tuple(f"{self.prefix}.encoder.layer.{number}.{theirs}.{kind}" for theirs in self._layer[part])

    def inside(self, key: str) -> str:
        """A key as the class without a head has it; those of heads stay."""
        first, _, rest = key.partition(".")
        return rest if first in (self.prefix, *self.aliases) else key

    def place(self, module: str) -> Place | None:
        """Where the parameters of a module of any class of the family are here; None if it is unknown."""
        module = self.inside(module)
        if module in head_layers(like_roberta=self._like_roberta):
            return Place(module)
        if (layer := _IN_LAYER.fullmatch(module)) is None:
            return self._ours.get(module)
        place = self._in_layer.get(layer[2] or "")
        return None if place is None else place._replace(owner=f"encoder.layers.{layer[1]}.{place.owner}".rstrip("."))

    def ours(self, key: str) -> str | None:
        """The canonical name for a key of any class of the family; None if it is unknown.

        Query, key and value all give the name of the fused matrix.
        """
        owner, _, kind = key.rpartition(".")
        place = self.place(owner) if kind in ("weight", "bias") else None
        return None if place is None else f"{place.owner}.{kind}"

    def is_buffer(self, key: str) -> bool:
        """Whether a key is of numbers that every model of a class has, or of a quantized layer."""
        inside = self.inside(key)
        return inside in ("embeddings.position_ids", "embeddings.token_type_ids") or self.is_range(key)

    def is_range(self, key: str) -> bool:
        """Whether a key is of a buffer of transformers' quantized layers."""
        return key.rpartition(".")[2] in self.buffers


MEGATRON_BERT = HuggingFaceNames(
    "bert",
    encoder={"encoder.final_norm": "encoder.ln"},
    layer={
        "attention_norm": ("attention.ln",),
        "mlp_norm": ("ln",),
        # Of decoders and relative positions, which only the documented classes have.
        "attention.distance": ("attention.self.distance_embedding",),
        "cross_attention_norm": ("crossattention.ln",),
        "cross_attention.query": ("crossattention.self.query",),
        "cross_attention.key_value": ("crossattention.self.key", "crossattention.self.value"),
        "cross_attention.output": ("crossattention.output.dense",),
        "cross_attention.distance": ("crossattention.self.distance_embedding",),
    },
    heads=_PRETRAINING,
)
BERT = HuggingFaceNames(
    "bert", encoder={"embeddings.norm": "embeddings.LayerNorm"}, layer=_POST_NORM, heads=_PRETRAINING
)
#: RoBERTa's are the same, with ``roberta.`` in front.
IBERT = HuggingFaceNames(
    "ibert",
    encoder={"embeddings.norm": "embeddings.LayerNorm"},
    layer=_POST_NORM,
    heads={
        "masked_head.dense": "lm_head.dense",
        "masked_head.norm": "lm_head.layer_norm",
        "masked_head": "lm_head",
        "output_embeddings": "lm_head.decoder",
    },
    like_roberta=True,
    aliases=("roberta",),
    buffers=frozenset(
        {
            *("x_min", "x_max", "act_scaling_factor", "weight_integer", "weight_scaling_factor", "fc_scaling_factor"),
            *("bias_integer", "shift"),
        }
    ),
)


def separate(tensor: Tensor, parts: int, head_dim: int) -> tuple[Tensor, ...]:
    """The ``parts`` projections of a fused matrix (or bias) with rows ``[heads, parts, head_dim]``."""
    if parts == 1:
        return (tensor,)
    by_head = tensor.unflatten(0, (-1, parts, head_dim))
    return tuple(by_head[:, index].flatten(0, 1) for index in range(parts))


def fuse(tensors: Sequence[Tensor], head_dim: int) -> Tensor:
    """The inverse of :func:`separate`."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.stack([tensor.unflatten(0, (-1, head_dim)) for tensor in tensors], dim=1).flatten(0, 2)
