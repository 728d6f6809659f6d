# SPDX-License-Identifier: Apache-2.0
"""Keys and values of tokens that were decoded before, in transformers' caches and as the layers take them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from megatron_bert.family.checks import check_tensor, computing_device, promoted
from megatron_bert.model.requests import LayerCache
from parallel.errors import UserError

if TYPE_CHECKING:
    from megatron_bert.family.pretrained import DocumentedModel

_REMEDY = "give what an earlier forward pass returned"


def opened_cache(past: Any) -> tuple[Cache | None, tuple[LayerCache, ...]]:
    """What a caller gives as ``past_key_values``: a cache, or tuples of tensors as transformers 4 had them.

    Returns:
        The cache that is to be filled, if there is one, and its keys and values per layer; none where it is empty.

    Raises:
        UserError: it is something else, or a cache that does not grow.
    """
    if past is None:
        return None, ()
    if isinstance(past, Cache):
        own = past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past
        if wrong := [layer for layer in own.layers if not isinstance(layer, DynamicLayer) or layer.is_sliding]:
            raise UserError(
                f"past_key_values has layers of {type(wrong[0]).__name__}, which do not grow: give a DynamicCache, or "
                "leave cache_implementation out"
            )
        entries: tuple[Any, ...] = tuple((layer.keys, layer.values) for layer in own.layers if layer.get_seq_length())
        if isinstance(past, EncoderDecoderCache) and any(past.is_updated.values()):
            crossed = past.cross_attention_cache.layers
            entries = tuple((*entry, other.keys, other.values) for entry, other in zip(entries, crossed, strict=True))
        return past, entries
    try:
        entries = tuple(tuple(entry) for entry in past)
    except TypeError:
        raise UserError(f"past_key_values is a {type(past).__name__}: {_REMEDY}") from None
    return None, entries


def checked_cache(entries: tuple[LayerCache, ...], model: DocumentedModel, batch: int) -> tuple[LayerCache, ...]:
    """Keys and values that fit a model; None for none.

    Args:
        entries: as they are given, not empty.
        model: that is to go on from them.
        batch: B.

    Raises:
        UserError: they are not of this model and batch.
    """
    if not getattr(model.config, "is_decoder", False):
        raise UserError("past_key_values is given, but only decoders go on from a cache: set is_decoder=True")
    layers, counts = model.layer_list(), {len(entry) for entry in entries}
    if len(entries) != len(layers) or counts not in ({2}, {4}):
        raise UserError(
            f"past_key_values has {len(entries)} entries of {sorted(counts)} tensors, expected {len(layers)} of 2 "
            f"(key, value), or 4 with those of the encoder: {_REMEDY}"
        )
    if counts == {4} and not model.config.add_cross_attention:
        raise UserError(
            "past_key_values holds keys and values of an encoder, but the model has no cross-attention: set "
            "add_cross_attention"
        )
    lengths = [_tokens(key) for key in entries[0][::2]]
    checked = []
    for layer, entry in zip(layers, entries, strict=True):
        modules = (layer.attention, layer.cross_attention) if len(lengths) == 2 else (layer.attention,)
        shapes = [
            (batch, module.heads, length, module.head_dim)
            for module, length in zip(modules, lengths, strict=True)
            for _ in ("key", "value")
        ]
        checked.append(tuple(_part(part, shape, model) for part, shape in zip(entry, shapes, strict=True)))
    return tuple(checked)


def filled_cache(cache: Cache | None, entries: tuple[LayerCache, ...]) -> Cache:
    """A cache, a new one where there is none, with the keys and values that the layers have now."""
    if cache is None:
        own, crossed = DynamicCache(), DynamicCache()
        cache = EncoderDecoderCache(own, crossed) if len(entries[0]) == 4 else own
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    _put(own, [entry[:2] for entry in entries])
    if isinstance(cache, EncoderDecoderCache) and len(entries[0]) == 4:
        _put(cache.cross_attention_cache, [entry[2:] for entry in entries])
        cache.is_updated = dict.fromkeys(range(len(entries)), True)
    return cache


def _put(cache: Cache, entries: list[LayerCache]) -> None:
    for number, (key, value) in enumerate(entries):
        while len(cache.layers) <= number:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[number]
        if not layer.is_initialized:
            layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value


def _tokens(key: Any) -> int:
    return key.shape[2] if isinstance(key, Tensor) and key.dim() == 4 else 0


def _part(part: Any, shape: tuple[int, ...], model: DocumentedModel) -> Tensor:
    part = check_tensor("an entry of past_key_values", part, computing_device(model))
    if tuple(part.shape) != shape:
        batch, heads, length, size = shape
        expected = f"[{batch}, {heads}, {length or 'tokens'}, {size}]"
        raise UserError(
            f"past_key_values holds {list(part.shape)}, expected tensors {expected}: {_REMEDY} over the same batch"
        )
    return promoted("past_key_values", part, model.dtype)
