# SPDX-License-Identifier: Apache-2.0
"""Attention masks as callers give them, and what attention needs of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.errors import UserError

#: What is added to a score at least, for a key not to be attended to.
_HIDDEN = -1e3


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
    """A mask of keys ``[B, K]`` or of pairs ``[B, Q, K]`` or ``[B, 1, Q, K]``.

    1 or true is where a key may be attended to. With an axis for heads it may also be of floating point: what
    transformers adds to scores, 0 or a large negative number.

    Raises:
        UserError: another shape, or other values.
    """
    if mask is None:
        return Mask()
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    pairs = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] == 1
    pairs = pairs and mask.shape[2] in (1, queries) and mask.shape[3] == keys
    if not pairs and shape not in ((batch, keys), (batch, queries, keys)):
        raise UserError(
            f"{name} has shape {list(shape) if isinstance(shape, tuple) else shape}, expected [{batch}, {keys}] "
            f"(which tokens count) or [{batch}, {queries}, {keys}] (which token each may see)"
        )
    if pairs:
        return _of_pairs(name, mask)
    allowed = mask.bool()
    by_key = mask.dim() == 2
    full = allowed[:, None, None, :] if by_key else allowed[:, None]
    if torch.compiler.is_compiling():  # which values it holds is not known
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


def _of_pairs(name: str, mask: Tensor) -> Mask:
    added = mask.is_floating_point()
    allowed = mask > _HIDDEN if added else mask.bool()
    if torch.compiler.is_compiling():
        return Mask(full=allowed)
    known = (mask == 0) | ((mask <= _HIDDEN) if added else (mask == 1))
    everything, attended, zero_one = torch.stack([allowed.all(), allowed.any(-1).all(), known.all()]).tolist()
    if not zero_one:
        expected = "0 and large negative numbers" if added else "0 and 1"
        raise UserError(f"{name} holds values other than {expected}: say of every pair whether it may be attended to")
    return Mask() if everything else Mask(full=allowed, unattended=not attended)


def causal(mask: Mask, given: Tensor | None, queries: int, keys: int, device: torch.device) -> Mask:
    """The mask of a decoder: of the keys that count, those up to each query.

    Args:
        mask: as read; one of pairs says all there is to say, and is left as it is.
        given: what it was read from.
        queries: Q, the last of the keys.
        keys: K.
        device: of the result.
    """
    if given is not None and given.dim() > 2:
        return mask
    if queries == 1:
        return mask
    position = torch.arange(keys, device=device)
    past = position <= position[keys - queries :, None]
    if mask.keys is None:
        return Mask(full=past[None, None])
    full = past & mask.keys[:, None, None, :]
    unattended = not torch.compiler.is_compiling() and not bool(full.any(-1).all())
    return Mask(keys=mask.keys, full=full, unattended=unattended, starts=mask.starts)
