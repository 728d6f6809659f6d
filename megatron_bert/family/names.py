"""Parameter names: those of these classes, of pretraining checkpoints, and of transformers' classes.

| here (with a head)             | pretraining               | transformers                                       |
|--------------------------------|---------------------------|----------------------------------------------------|
| bert.embeddings.., bert.encoder.. | embeddings.., encoder.. | bert.embeddings.., bert.encoder.layer..            |
| bert.pooler                    | pair_head.pooler          | bert.pooler.dense                                  |
| pair_classifier                | pair_head.classifier      | cls.seq_relationship                               |
| masked_head                    | masked_head               | cls.predictions                                    |
| output_embeddings              | (tied)                    | cls.predictions.decoder                            |
| classifier, qa_outputs         |                           | the same                                           |
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_bert.convert.huggingface_names import their_names

_RENAMED = {"pooler.": "pair_head.pooler.", "pair_classifier.": "pair_head.classifier."}
_OUTSIDE_LAYERS = {
    "output_embeddings.weight": "cls.predictions.decoder.weight",
    "classifier.weight": "classifier.weight",
    "classifier.bias": "classifier.bias",
    "qa_outputs.weight": "qa_outputs.weight",
    "qa_outputs.bias": "qa_outputs.bias",
}
#: Parts of a layer that a pretraining encoder does not have.
_IN_LAYERS = {
    "attention.distance": ("attention.self.distance_embedding",),
    "cross_attention_norm": ("crossattention.ln",),
    "cross_attention.query": ("crossattention.self.query",),
    "cross_attention.key_value": ("crossattention.self.key", "crossattention.self.value"),
    "cross_attention.output": ("crossattention.output.dense",),
    "cross_attention.distance": ("crossattention.self.distance_embedding",),
}


def canonical_name(name: str) -> str:
    """The name in a pretraining checkpoint of a parameter (or of a module, with a dot at the end)."""
    name = name.removeprefix("bert.")
    for ours, canonical in _RENAMED.items():
        if name.startswith(ours):
            return canonical + name.removeprefix(ours)
    return name


def huggingface_names(name: str) -> tuple[str, ...]:
    """The name in transformers of a parameter of these classes, with ``bert.`` in front; several for a fused matrix."""
    name = canonical_name(name)
    if name in _OUTSIDE_LAYERS:
        return (_OUTSIDE_LAYERS[name],)
    owner, _, kind = name.rpartition(".")
    if owner.startswith("encoder.layers."):
        _, _, number, part = owner.split(".", 3)
        if part in _IN_LAYERS:
            return tuple(f"bert.encoder.layer.{number}.{theirs}.{kind}" for theirs in _IN_LAYERS[part])
    return their_names(name)


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
