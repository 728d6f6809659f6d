"""Keys and values of tokens that were decoded before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.requests import LayerCache
from parallel.errors import UserError


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


def checked_cache(past: Any, config: MegatronBertConfig, batch: int) -> KeyValueCache | None:
    """A cache from what a caller gives as ``past_key_values``: a cache, or tuples of tensors; None for an empty one.

    Raises:
        UserError: it is not of this model and batch.
    """
    try:
        if past is None or len(past) == 0:
            return None
        layers = tuple(tuple(layer) for layer in past)
    except TypeError:
        raise UserError(
            f"past_key_values is a {type(past).__name__}: give what an earlier forward pass returned"
        ) from None
    if not config.is_decoder:
        raise UserError("past_key_values is given, but only decoders go on from a cache: set is_decoder=True")
    counts = {len(layer) for layer in layers}
    if len(layers) != config.num_hidden_layers or counts not in ({2}, {4}):
        raise UserError(
            f"past_key_values has {len(layers)} entries of {sorted(counts)} tensors, expected "
            f"{config.num_hidden_layers} of 2 (key, value), or 4 with those of the encoder: give what an earlier "
            "forward pass returned"
        )
    tokens = layers[0][0].shape[-2] if isinstance(layers[0][0], Tensor) else 0
    for layer in layers:
        for part in layer:
            good = isinstance(part, Tensor) and part.dim() == 4 and part.shape[0] == batch
            if not good or part.shape[3] != config.head_dim or (part is layer[0] and part.shape[2] != tokens):
                shape = list(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__
                raise UserError(
                    f"past_key_values holds {shape}, expected tensors [{batch}, heads, {tokens}, {config.head_dim}]: "
                    "give what an earlier forward pass over the same batch returned"
                )
    return KeyValueCache(layers)
