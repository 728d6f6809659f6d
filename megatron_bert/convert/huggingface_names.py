"""Names of transformers' MegatronBertForPreTraining, and its separate query, key and value from the fused matrix."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from megatron_bert.convert.state import QUERY_KEY_VALUE

_NAMES = {
    "embeddings.word_embeddings": "bert.embeddings.word_embeddings",
    "embeddings.position_embeddings": "bert.embeddings.position_embeddings",
    "embeddings.token_type_embeddings": "bert.embeddings.token_type_embeddings",
    "encoder.final_norm": "bert.encoder.ln",
    "masked_head.dense": "cls.predictions.transform.dense",
    "masked_head.norm": "cls.predictions.transform.LayerNorm",
    "masked_head": "cls.predictions",
    "pair_head.pooler": "bert.pooler.dense",
    "pair_head.classifier": "cls.seq_relationship",
}
_LAYER_NAMES = {
    "attention_norm": "attention.ln",
    "attention.output": "attention.output.dense",
    "mlp_norm": "ln",
    "mlp.intermediate": "intermediate.dense",
    "mlp.output": "output.dense",
}
_OURS = {theirs: ours for ours, theirs in (_NAMES | _LAYER_NAMES).items()}
_PROJECTIONS = ("query", "key", "value")
_LAYER = re.compile(r"bert\.encoder\.layer\.(\d{1,6})\.(.+)\.(weight|bias)")


def their_names(name: str) -> tuple[str, ...]:
    """Their name for a canonical one: three for the fused matrix."""
    owner, _, kind = name.rpartition(".")
    if not owner.startswith("encoder.layers."):
        return (f"{_NAMES[owner]}.{kind}",)
    _, _, number, part = owner.split(".", 3)
    prefix = f"bert.encoder.layer.{number}"
    if part == QUERY_KEY_VALUE:
        return tuple(f"{prefix}.attention.self.{projection}.{kind}" for projection in _PROJECTIONS)
    return (f"{prefix}.{_LAYER_NAMES[part]}.{kind}",)


def our_name(key: str) -> str | None:
    """The canonical name for one of theirs (with ``bert.`` in front); None if it is unknown.

    Query, key and value all give the name of the fused matrix.
    """
    if (layer := _LAYER.fullmatch(key)) is not None:
        number, part, kind = layer.groups()
        ours = QUERY_KEY_VALUE if part in {f"attention.self.{p}" for p in _PROJECTIONS} else _OURS.get(part)
        return None if ours is None else f"encoder.layers.{number}.{ours}.{kind}"
    owner, _, kind = key.rpartition(".")
    return f"{_OURS[owner]}.{kind}" if owner in _NAMES.values() and kind in ("weight", "bias") else None


def projection_of(key: str) -> int:
    """0 for a query, 1 for a key, 2 for a value tensor."""
    return _PROJECTIONS.index(key.split(".")[-2])


def separate(name: str, tensor: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Their tensors for a canonical one, in the order of :func:`their_names`."""
    if QUERY_KEY_VALUE not in name:
        return (tensor,)
    by_head = tensor.unflatten(0, (heads, 3, -1))
    return tuple(by_head[:, index].flatten(0, 1) for index in range(3))


def fuse(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """The fused matrix (or bias), rows ``[heads, 3, head_dim]``."""
    return torch.stack([part.unflatten(0, (heads, -1)) for part in (query, key, value)], dim=1).flatten(0, 2)
