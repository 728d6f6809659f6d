# SPDX-License-Identifier: Apache-2.0
"""Attention masks as callers give them, and what attention needs of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.errors import UserError
from parallel.recording import values_unknown


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys queries may attend to.

    Attributes:
        keys: bool ``[B, K]``, where the mask is the same for all queries; None otherwise, or when all keys count.
        full: broadcastable to ``[B, heads, Q, K]``: bool, or what is added to scores; None when all keys count.
        unattended: some query may attend to none.
        starts: ``keys`` counts the first token of every sequence.
    """

    keys: Tensor | None = None
    full: Tensor | None = None
    unattended: bool = False
    starts: bool = True


def with_room(mask: Tensor | None, batch: int, keys: int, room: int, device: torch.device) -> Tensor | None:
    """A mask of ``keys`` for a cache of fixed size that has ``room`` for more, which do not count yet."""
    if room == keys:
        return mask
    if mask is None:
        mask = torch.ones((batch, keys), dtype=torch.bool, device=device)
    return torch.nn.functional.pad(mask, (0, room - keys)) if mask.dim() == 2 and mask.shape[1] == keys else mask


def read_mask(name: str, mask: Tensor | None, shape: tuple[int, int, int, int]) -> Mask:
    """A mask of keys ``[B, K]``, of pairs ``[B, Q, K]``, or what broadcasts to ``[B, heads, Q, K]``.

    1 or true is where a key may be attended to. With an axis for heads it may also be of floating point, and is added
    to the scores, as transformers has it. B may be 1 for all sequences.

    Args:
        name: of the argument.
        mask: as it is given.
        shape: B, heads, Q and K.

    Raises:
        UserError: another shape, or other values.
    """
    if mask is None:
        return Mask()
    batch, heads, queries, keys = shape
    wanted = {2: (batch, keys), 3: (batch, queries, keys), 4: shape}.get(mask.dim(), ())
    fits = (own in (1, size) for own, size in zip(mask.shape, wanted, strict=False))
    if not wanted or mask.shape[-1] != keys or not all(fits):
        raise UserError(
            f"{name} has shape {list(mask.shape)}, expected [{batch}, {keys}] (which tokens count), "
            f"[{batch}, {queries}, {keys}] (which token each may see) or, for heads of their own, "
            f"[{batch}, {heads}, {queries}, {keys}]"
        )
    if mask.dim() == 4 and mask.is_floating_point():
        return _of_scores(name, mask)
    allowed = mask.bool()
    by_key = mask.dim() == 2
    allowed = allowed.expand(batch, keys) if by_key else allowed
    full = {2: allowed[:, None, None], 3: allowed[:, None], 4: allowed}[mask.dim()]
    if values_unknown():  # which values it holds is not known
        return Mask(keys=allowed if by_key else None, full=full)
    facts = [allowed.all(), allowed.any(-1).all(), allowed[:, 0].all()]
    if mask.dtype != torch.bool:
        facts.append(((mask == 0) | (mask == 1)).all())
    everything, attended, starts, *zero_one = torch.stack(facts).tolist()
    if zero_one == [False]:
        raise UserError(f"{name} holds values other than 0 and 1: 1 marks what may be attended to")
    if everything:
        return Mask()
    if not by_key:
        return Mask(full=full, unattended=not attended)
    return Mask(keys=allowed, full=full, unattended=not attended, starts=starts)


def _of_scores(name: str, mask: Tensor) -> Mask:
    """What is added to scores, as it is: how much a key is hidden counts where no other key is nearer."""
    if values_unknown() or mask.requires_grad:
        return Mask(full=mask)
    nothing, numbers = torch.stack([(mask == 0).all(), (mask < torch.inf).all()]).tolist()
    if not numbers:
        raise UserError(f"{name} holds values that are not numbers: give what is to be added to scores")
    return Mask() if nothing else Mask(full=mask)


def causal(mask: Mask, given: Tensor | None, past: int, queries: int, keys: int, device: torch.device) -> Mask:
    """The mask of a decoder: of the keys that count, those up to each query.

    Args:
        mask: as read; one of pairs says all there is to say, and is left as it is.
        given: what it was read from.
        past: P, tokens before the queries.
    """
    if given is not None and given.dim() > 2:
        return mask
    if past + queries == keys and queries == 1:
        return mask
    position = torch.arange(keys, device=device)
    seen = position <= position[past : past + queries, None]
    if mask.keys is None:
        return Mask(full=seen[None, None])
    full = seen & mask.keys[:, None, None, :]
    unattended = not values_unknown() and not bool(full.any(-1).all())
    return Mask(keys=mask.keys, full=full, unattended=unattended, starts=mask.starts)
