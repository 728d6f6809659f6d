# SPDX-License-Identifier: Apache-2.0
"""The families of encoders: Megatron's BERT, BERT, and RoBERTa with I-BERT, by the names of transformers' classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_bert.convert.name_table import Names, NameTable, Place
from megatron_bert.convert.state import QUERY_KEY_VALUE
from megatron_bert.model.configuration import BertConfig, MegatronBertConfig, RobertaConfig
from megatron_bert.model.task_heads.table import head_layers

#: What DataParallel and torch.compile put before the names of a model's tensors.
WRAPPERS = r"^(?:module\.|_orig_mod\.)+"
#: Module here -> theirs, behind the name of the encoder; several for a fused matrix.
_ENCODER = {
    "embeddings": "embeddings",
    "embeddings.word_embeddings": "embeddings.word_embeddings",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
    "pair_head.pooler": "pooler.dense",
    "encoder.layers.{}": "encoder.layer.{}",
}
_LAYER: dict[str, Names] = {
    QUERY_KEY_VALUE: ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output": "attention.output.dense",
    "mlp.intermediate": "intermediate.dense",
    "mlp.output": "output.dense",
}
_PRETRAINING = {
    "masked_head.dense": "cls.predictions.transform.dense",
    "masked_head.norm": "cls.predictions.transform.LayerNorm",
    "masked_head": "cls.predictions",
    "output_embeddings": "cls.predictions.decoder",
    "pair_head.classifier": "cls.seq_relationship",
}
_POST_NORM = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}


class HuggingFaceNames(NameTable):
    """One family of classes: their names, and what else differs between families in files.

    Args:
        prefix: the encoder's name in classes with a head.
        config: class of the configuration, which knows the layers of the heads of tasks.
        classes: what the names of transformers' classes begin with.
        encoder: module here -> theirs, behind the prefix, beyond what all families have.
        layer: the same inside a layer.
        heads: the same, without a prefix; heads of tasks have their names here.
        aliases: names of the encoder in other families whose weights are the same.
        buffers: last parts of the names of buffers that quantized layers have.
    """

    def __init__(
        self,
        prefix: str,
        config: type[MegatronBertConfig],
        classes: str,
        *,
        encoder: Mapping[str, str],
        layer: Mapping[str, Names],
        heads: Mapping[str, str],
        aliases: tuple[str, ...] = (),
        buffers: frozenset[str] = frozenset(),
    ) -> None:
        self.prefix, self.config, self.classes, self.aliases, self.buffers = prefix, config, classes, aliases, buffers
        behind = {ours: f"{prefix}.{theirs}" for ours, theirs in (_ENCODER | dict(encoder)).items()}
        super().__init__(behind | dict(heads), f"{prefix}.encoder.layer", _LAYER | dict(layer), self.inside)

    def _of_task(self, name: str) -> bool:
        """Whether a parameter is of the head of a task; they are asked for each time, as programs add kinds of them."""
        return name.rpartition(".")[0] in head_layers(like_roberta=self.config.like_roberta)

    def theirs(self, name: str) -> tuple[str, ...]:
        """Their name of a parameter, in classes with a head; see :meth:`NameTable.theirs`."""
        return (name,) if self._of_task(name) else super().theirs(name)

    def ours(self, key: str) -> Place | None:
        """Where a parameter of any class of the family is here; None if it is unknown."""
        inside = self.inside(key)
        return Place(inside) if self._of_task(inside) else super().ours(key)

    def place(self, module: str) -> Place | None:
        """Where the parameters of a module of any class of the family are here; None if it is unknown."""
        place = self.ours(f"{module}.weight")
        return None if place is None else place._replace(owner=place.owner.removesuffix(".weight"))

    def inside(self, key: str) -> str:
        """A key as the class without a head has it; those of heads stay."""
        first, _, rest = key.partition(".")
        return rest if first in (self.prefix, *self.aliases) else key

    def is_buffer(self, key: str) -> bool:
        """Whether a key is of numbers that every model of a class has, or of a quantized layer."""
        inside = self.inside(key)
        return inside in ("embeddings.position_ids", "embeddings.token_type_ids") or self.is_range(key)

    def is_range(self, key: str) -> bool:
        """Whether a key is of a buffer of transformers' quantized layers."""
        return key.rpartition(".")[2] in self.buffers


MEGATRON_BERT = HuggingFaceNames(
    "bert",
    MegatronBertConfig,
    "MegatronBert",
    encoder={"encoder.final_norm": "encoder.ln"},
    layer={
        "attention_norm": "attention.ln",
        "mlp_norm": "ln",
        # Of decoders and relative positions, which only the documented classes have.
        "attention.distance": "attention.self.distance_embedding",
        "cross_attention_norm": "crossattention.ln",
        "cross_attention.query": "crossattention.self.query",
        "cross_attention.key_value": ("crossattention.self.key", "crossattention.self.value"),
        "cross_attention.output": "crossattention.output.dense",
        "cross_attention.distance": "crossattention.self.distance_embedding",
    },
    heads=_PRETRAINING,
)
BERT = HuggingFaceNames(
    "bert",
    BertConfig,
    "Bert",
    encoder={"embeddings.norm": "embeddings.LayerNorm"},
    layer=_POST_NORM,
    heads=_PRETRAINING,
)
#: RoBERTa's are the same, with ``roberta.`` in front.
IBERT = HuggingFaceNames(
    "ibert",
    RobertaConfig,
    "IBert",
    encoder={"embeddings.norm": "embeddings.LayerNorm"},
    layer=_POST_NORM,
    heads={
        "masked_head.dense": "lm_head.dense",
        "masked_head.norm": "lm_head.layer_norm",
        "masked_head": "lm_head",
        "output_embeddings": "lm_head.decoder",
    },
    aliases=("roberta",),
    buffers=frozenset(
        {
            *("x_min", "x_max", "act_scaling_factor", "weight_integer", "weight_scaling_factor", "fc_scaling_factor"),
            *("bias_integer", "shift"),
        }
    ),
)


#: model_type in a config.json -> family.
MODEL_TYPES = {
    name: family
    for family in (MEGATRON_BERT, IBERT, BERT)
    for name in (family.config.model_type, *sorted(family.config.also_reads))
}
#: Those of what is trained for tasks.
TRAINED_TYPES = [name for name, family in MODEL_TYPES.items() if family is not BERT]


def family_of(config: MegatronBertConfig) -> HuggingFaceNames:
    """The family of an encoder."""
    return MODEL_TYPES[config.model_type]


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
