"""Attention masks as callers give them, and what attention needs of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys queries may attend to.

    Attributes:
        keys: bool ``[B, K]``, where the mask is the same for all queries; None otherwise, or when all keys count.
        full: bool, broadcastable to ``[B, 1, Q, K]``; None when all keys count.
        unattended: some query may attend to none.
        starts: ``keys`` counts the first token of every sequence.
    """

    keys: Tensor | None = None
    full: Tensor | None = None
    unattended: bool = False
    starts: bool = True


def read_mask(name: str, mask: Tensor | None, batch: int, queries: int, keys: int) -> Mask:
    """A mask of keys ``[B, K]`` or of pairs ``[B, Q, K]``: 1 or true where a key may be attended to.

    Raises:
        UserError: another shape, or values other than 0 and 1.
    """
    if mask is None:
        return Mask()
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if shape not in ((batch, keys), (batch, queries, keys)):
        raise UserError(
            f"{name} has shape {list(shape) if isinstance(shape, tuple) else shape}, expected [{batch}, {keys}] "
            f"(which tokens count) or [{batch}, {queries}, {keys}] (which token each may see)"
        )
    allowed = mask.bool()
    facts = [allowed.all(), allowed.any(-1).all(), allowed[:, 0].all()]
    if mask.dtype != torch.bool:
        facts.append(((mask == 0) | (mask == 1)).all())
    everything, attended, starts, *zero_one = torch.stack(facts).tolist()
    if zero_one == [False]:
        raise UserError(f"{name} holds values other than 0 and 1: 1 marks what may be attended to")
    if everything:
        return Mask()
    if mask.dim() == 3:
        return Mask(full=allowed[:, None], unattended=not attended)
    return Mask(keys=allowed, full=allowed[:, None, None, :], unattended=not attended, starts=starts)


def causal(mask: Mask, given: Tensor | None, queries: int, keys: int, device: torch.device) -> Mask:
    """The mask of a decoder: of the keys that count, those up to each query.

    Args:
        mask: as read; one of pairs says all there is to say, and is left as it is.
        given: what it was read from.
        queries: Q, the last of the keys.
        keys: K.
        device: of the result.
    """
    if given is not None and given.dim() == 3:
        return mask
    if queries == 1:
        return mask
    position = torch.arange(keys, device=device)
    past = position <= position[keys - queries :, None]
    if mask.keys is None:
        return Mask(full=past[None, None])
    full = past & mask.keys[:, None, None, :]
    return Mask(keys=mask.keys, full=full, unattended=not bool(full.any(-1).all()), starts=mask.starts)
