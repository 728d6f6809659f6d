"""Keys and values of tokens that were decoded before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatron_bert.family.kinds import check_tensor, computing_device, widened
from megatron_bert.model.requests import LayerCache
from parallel.errors import UserError

if TYPE_CHECKING:
    from megatron_bert.family.pretrained import PreTrainedModel


class KeyValueCache(tuple[LayerCache, ...]):
    """A tuple with an entry a layer: key and value ``[B, heads on this rank, P, D]``, then those of the encoder.

    A forward pass never changes the cache it is given: it returns a longer one.
    """

    __slots__ = ()

    def get_seq_length(self) -> int:
        """Number of tokens in it, P."""
        return self[0][0].shape[2]

    def select(self, rows: Tensor) -> KeyValueCache:
        """The cache of some of the sequences, int64 ``[n]``, in that order."""
        return KeyValueCache(tuple(part.index_select(0, rows) for part in layer) for layer in self)


def checked_cache(past: Any, model: PreTrainedModel, batch: int) -> KeyValueCache | None:
    """A cache from what a caller gives as ``past_key_values``: a cache, or tuples of tensors; None for an empty one.

    Args:
        past: by the caller.
        model: that is to go on from it.
        batch: B.

    Raises:
        UserError: it is not of this model and batch.
    """
    try:
        if past is None or len(past) == 0:
            return None
        entries = tuple(tuple(entry) for entry in past)
    except TypeError:
        raise UserError(
            f"past_key_values is a {type(past).__name__}: give what an earlier forward pass returned"
        ) from None
    if not model.config.is_decoder:
        raise UserError("past_key_values is given, but only decoders go on from a cache: set is_decoder=True")
    layers, counts = model.layer_list(), {len(entry) for entry in entries}
    if len(entries) != len(layers) or counts not in ({2}, {4}):
        raise UserError(
            f"past_key_values has {len(entries)} entries of {sorted(counts)} tensors, expected {len(layers)} of 2 "
            "(key, value), or 4 with those of the encoder: give what an earlier forward pass returned"
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
    return KeyValueCache(checked)


def _tokens(key: Any) -> int:
    return key.shape[2] if isinstance(key, Tensor) and key.dim() == 4 else 0


def _part(part: Any, shape: tuple[int, ...], model: PreTrainedModel) -> Tensor:
    part = check_tensor("an entry of past_key_values", part, computing_device(model))
    if tuple(part.shape) != shape:
        batch, heads, length, size = shape
        expected = f"[{batch}, {heads}, {length or 'tokens'}, {size}]"
        raise UserError(
            f"past_key_values holds {list(part.shape)}, expected tensors {expected}: give what an earlier forward pass "
            "over the same batch returned"
        )
    return widened("past_key_values", part, model.dtype)
