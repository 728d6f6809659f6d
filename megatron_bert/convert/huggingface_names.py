# SPDX-License-Identifier: Apache-2.0
"""Names of transformers' classes of a family, and separate query, key and value from the fused matrix.

| here                                | transformers'                                                           |
|-------------------------------------|-------------------------------------------------------------------------|
| embeddings.., encoder.layers..      | the same, and encoder.layer.., behind the name of the encoder           |
| embeddings.norm, encoder.final_norm | embeddings.LayerNorm, encoder.ln                                        |
| attention_norm, mlp_norm            | attention.ln, ln; post-norm attention.output.LayerNorm, output.LayerNorm |
| pair_head.pooler, .classifier       | pooler.dense, cls.seq_relationship                                      |
| masked_head                         | cls.predictions; RoBERTa's lm_head                                      |
| classifier, qa_outputs              | the same                                                                |
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_bert.convert.state import QUERY_KEY_VALUE
from megatron_bert.model.task_heads.table import head_layers

_ENCODER = {
    "embeddings.word_embeddings": "embeddings.word_embeddings",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
    "pair_head.pooler": "pooler.dense",
}
_LAYER = {
    "attention.output": "attention.output.dense",
    "mlp.intermediate": "intermediate.dense",
    "mlp.output": "output.dense",
}
_PRETRAINING = {
    "masked_head.dense": "cls.predictions.transform.dense",
    "masked_head.norm": "cls.predictions.transform.LayerNorm",
    "masked_head": "cls.predictions",
    "pair_head.classifier": "cls.seq_relationship",
}
_POST_NORM = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}
_PROJECTIONS = ("query", "key", "value")
_LAYER_KEY = re.compile(r"encoder\.layer\.(\d{1,6})\.(.+)\.(weight|bias)")
#: Parts of the encoder, whose names have nothing in front in classes without a head.
_PARTS = ("embeddings", "encoder", "pooler")


class HuggingFaceNames:
    """The names of one family of classes.

    Args:
        prefix: the encoder's name in classes with a head.
        encoder: canonical owner -> theirs, behind the prefix, beyond what all families have.
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
        layer: Mapping[str, str],
        heads: Mapping[str, str],
        like_roberta: bool = False,
        aliases: tuple[str, ...] = (),
        buffers: frozenset[str] = frozenset(),
    ) -> None:
        self.prefix, self._aliases, self._buffers = prefix, (prefix, *aliases), buffers
        self._encoder, self._layer, self._heads = _ENCODER | dict(encoder), _LAYER | dict(layer), dict(heads)
        self._like_roberta = like_roberta
        self._ours = {theirs: ours for ours, theirs in self._encoder.items()}
        self._our_layer = {theirs: ours for ours, theirs in self._layer.items()}
        self._our_heads = {theirs: ours for ours, theirs in self._heads.items()}
        decoder = f"{self._heads['masked_head']}.decoder"
        #: Copies of other tensors under names of their own: key -> canonical name.
        self.copies = {f"{decoder}.weight": "embeddings.word_embeddings.weight", f"{decoder}.bias": "masked_head.bias"}

    def theirs(self, name: str) -> tuple[str, ...]:
        """Their name, in classes with a head, for a canonical one: three for the fused matrix.

        Raises:
            KeyError: no class of the family has it.
        """
        owner, _, kind = name.rpartition(".")
        if owner in self._heads:
            return (f"{self._heads[owner]}.{kind}",)
        if owner in self._encoder:
            return (f"{self.prefix}.{self._encoder[owner]}.{kind}",)
        if not owner.startswith("encoder.layers."):
            if owner not in head_layers(like_roberta=self._like_roberta):
                raise KeyError(owner)
            return (name,)
        _, _, number, part = owner.split(".", 3)
        place = f"{self.prefix}.encoder.layer.{number}"
        if part == QUERY_KEY_VALUE:
            return tuple(f"{place}.attention.self.{projection}.{kind}" for projection in _PROJECTIONS)
        return (f"{place}.{self._layer[part]}.{kind}",)

    def inside(self, key: str) -> str:
        """A key as the class without a head has it; those of heads stay."""
        first, _, rest = key.partition(".")
        return rest if first in self._aliases else key

    def ours(self, key: str) -> str | None:
        """The canonical name for a key of any class of the family; None if it is unknown.

        Query, key and value all give the name of the fused matrix.
        """
        key = self.inside(key)
        if (layer := _LAYER_KEY.fullmatch(key)) is not None:
            number, part, kind = layer.groups()
            fused = part in {f"attention.self.{p}" for p in _PROJECTIONS}
            ours = QUERY_KEY_VALUE if fused else self._our_layer.get(part)
            return None if ours is None else f"encoder.layers.{number}.{ours}.{kind}"
        owner, _, kind = key.rpartition(".")
        found = (self._ours if key.startswith(_PARTS) else self._our_heads).get(owner)
        if owner in head_layers(like_roberta=self._like_roberta):
            found = owner
        return None if found is None or kind not in ("weight", "bias") else f"{found}.{kind}"

    def is_buffer(self, key: str) -> bool:
        """Whether a key is of numbers that every model of a class has, or of a quantized layer."""
        inside = self.inside(key)
        return inside in ("embeddings.position_ids", "embeddings.token_type_ids") or self.is_range(key)

    def is_range(self, key: str) -> bool:
        """Whether a key is of a buffer of transformers' quantized layers."""
        return key.rpartition(".")[2] in self._buffers


MEGATRON_BERT = HuggingFaceNames(
    "bert",
    encoder={"encoder.final_norm": "encoder.ln"},
    layer={"attention_norm": "attention.ln", "mlp_norm": "ln"},
    heads=_PRETRAINING,
)
BERT = HuggingFaceNames(
    "bert", encoder={"embeddings.norm": "embeddings.LayerNorm"}, layer=_POST_NORM, heads=_PRETRAINING
)
IBERT = HuggingFaceNames(
    "ibert",
    encoder={"embeddings.norm": "embeddings.LayerNorm"},
    layer=_POST_NORM,
    heads={
        "masked_head.dense": "lm_head.dense",
        "masked_head.norm": "lm_head.layer_norm",
        "masked_head": "lm_head",
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


def their_names(name: str) -> tuple[str, ...]:
    """The name in transformers' MegatronBert classes for a canonical one."""
    return MEGATRON_BERT.theirs(name)


def projection_of(key: str) -> int:
    """0 for a query, 1 for a key, 2 for a value tensor."""
    return _PROJECTIONS.index(key.split(".")[-2])


def separate(name: str, tensor: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Their tensors for a canonical one, in the order of :meth:`HuggingFaceNames.theirs`."""
    if QUERY_KEY_VALUE not in name:
        return (tensor,)
    by_head = tensor.unflatten(0, (heads, 3, -1))
    return tuple(by_head[:, index].flatten(0, 1) for index in range(3))


def fuse(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """The fused matrix (or bias), rows ``[heads, 3, head_dim]``."""
    return torch.stack([part.unflatten(0, (heads, -1)) for part in (query, key, value)], dim=1).flatten(0, 2)
