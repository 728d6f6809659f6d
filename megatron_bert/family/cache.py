# SPDX-License-Identifier: Apache-2.0
"""Keys and values of tokens that came before, in transformers' caches and as the layers ask for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from megatron_bert.family.checks import check_tensor, computing_device, promoted
from parallel.errors import UserError, its_class

if TYPE_CHECKING:
    from megatron_bert.family.pretrained import DocumentedModel

Pair = tuple[Tensor, Tensor]
_REMEDY = "give what an earlier forward pass returned"


@dataclass(frozen=True)
class CachedLayer:
    """One layer of a cache, as the layers of the model use it: a LayerMemory."""

    cache: Cache
    number: int

    def grown(self, key: Tensor, value: Tensor) -> Pair:
        """Add keys and values of self-attention."""
        return _of_tokens(self.cache).update(key, value, self.number)

    def of_encoder(self, project: Callable[[], Pair]) -> Pair:
        """Keys and values of cross-attention, which only a cache with a part for them keeps."""
        if not isinstance(self.cache, EncoderDecoderCache):
            return project()
        crossed = self.cache.cross_attention_cache
        if self.cache.is_updated.get(self.number):
            return crossed.layers[self.number].keys, crossed.layers[self.number].values
        self.cache.is_updated[self.number] = True
        return crossed.update(*project(), self.number)


def _of_tokens(cache: Cache) -> Cache:
    """The part of self-attention."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def new_cache(model: DocumentedModel) -> Cache:
    """An empty cache, as transformers' class begins one."""
    return EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))


def encoder_length(cache: Cache | None) -> int | None:
    """Number of an encoder's tokens whose keys and values are in a cache; None where there are none."""
    if not isinstance(cache, EncoderDecoderCache) or not any(cache.is_updated.values()):
        return None
    return int(cache.cross_attention_cache.layers[0].keys.shape[2])


def opened_cache(past: Any, model: DocumentedModel, batch: int) -> Cache | None:
    """What a caller gives as ``past_key_values``: a cache, or tuples of tensors as transformers 4 had them.

    Raises:
        UserError: it is something else, not of this model and batch, or keeps only the last tokens.
    """
    if past is None:
        return None
    if isinstance(past, Cache):
        _check_cache(past, model, batch)
        return past
    try:
        entries = tuple(tuple(entry) for entry in past)
    except TypeError:
        raise UserError(f"past_key_values is {its_class(past)}: {_REMEDY}") from None
    if not entries:
        return None
    checked = _checked(entries, model, batch)
    crossed = DynamicCache([entry[2:] for entry in checked if len(entry) == 4])
    return EncoderDecoderCache(DynamicCache([entry[:2] for entry in checked]), crossed)


def _check_cache(past: Cache, model: DocumentedModel, batch: int) -> None:
    own = _of_tokens(past)
    if sliding := [layer for layer in own.layers if layer.is_sliding]:
        raise UserError(
            f"past_key_values has layers of {type(sliding[0]).__name__}, which keep the last tokens alone, but these "
            "models attend to all: give a DynamicCache or StaticCache"
        )
    crossed = past.cross_attention_cache.layers if encoder_length(past) is not None else []
    held = [layer for layer in own.layers if isinstance(layer, (DynamicLayer, StaticLayer)) and layer.is_initialized]
    entries: list[tuple[Any, ...]] = [(layer.keys, layer.values) for layer in held if layer.keys.numel()]
    if crossed and len(crossed) == len(entries):
        entries = [(*entry, layer.keys, layer.values) for entry, layer in zip(entries, crossed, strict=True)]
    if entries:
        _checked(tuple(entries), model, batch)


def _checked(entries: tuple[tuple[Any, ...], ...], model: DocumentedModel, batch: int) -> list[tuple[Tensor, ...]]:
    """Keys and values that fit a model, those of an encoder behind them."""
    layers, counts = model.layer_list(), {len(entry) for entry in entries}
    if len(entries) != len(layers) or counts not in ({2}, {4}):
        raise UserError(
            f"past_key_values has {len(entries)} entries of {sorted(counts)} tensors, expected {len(layers)} of 2 "
            f"(key, value), or 4 with those of the encoder: {_REMEDY}"
        )
    if counts == {4} and not getattr(model.config, "add_cross_attention", False):
        raise UserError(
            "past_key_values holds keys and values of an encoder, but the model has no cross-attention: set "
            "add_cross_attention"
        )
    lengths = [key.shape[2] if isinstance(key, Tensor) and key.dim() == 4 else 0 for key in entries[0][::2]]
    device, dtype = computing_device(model), model.dtype
    checked = []
    for layer, entry in zip(layers, entries, strict=True):
        modules = zip((layer.attention, layer.cross_attention), lengths)
        shapes = [(batch, module.heads, length, module.head_dim) for module, length in modules for _ in range(2)]
        checked.append(tuple(_part(part, shape, device, dtype) for part, shape in zip(entry, shapes, strict=True)))
    return checked


def _part(part: Any, shape: tuple[int, ...], device: torch.device | None, dtype: torch.dtype) -> Tensor:
    part = check_tensor("an entry of past_key_values", part, device)
    if tuple(part.shape) != shape:
        batch, heads, length, size = shape
        expected = f"[{batch}, {heads}, {length or 'tokens'}, {size}]"
        raise UserError(
            f"past_key_values holds {list(part.shape)}, expected tensors {expected}: {_REMEDY} over the same batch"
        )
    return promoted("past_key_values", part, dtype)
