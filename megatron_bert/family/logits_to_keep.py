# SPDX-License-Identifier: Apache-2.0
"""Which tokens' logits a model gives that predicts next words, as transformers' ``logits_to_keep`` says it.

Shapes: B sequences, S tokens of each, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_bert.family.checks import check_tensor, described
from parallel.errors import UserError
from parallel.recording import values_unknown


def check_kept(kept: int | Tensor, batch: int, length: int) -> None:
    """Check what says which tokens' hidden states are kept.

    Args:
        kept: see :func:`kept_states`.
        batch, length: B and S.

    Raises:
        UserError: another kind of thing or shape, or places beyond the tokens.
    """
    if not isinstance(kept, Tensor):
        if not isinstance(kept, int):
            raise UserError(
                f"logits_to_keep is {described(kept)}: give a number of tokens, 0 for all, or a tensor of places"
            )
        return
    check_tensor("logits_to_keep", kept)
    shape = list(kept.shape)
    if kept.dtype == torch.bool:
        if shape not in ([length], [batch, length]):
            raise UserError(
                f"logits_to_keep has shape {shape} and type torch.bool, expected [{length}] or [{batch}, {length}]: "
                "say of every token whether it is kept"
            )
        return
    if kept.dtype not in (torch.int64, torch.int32) or kept.device.type == "meta":
        raise UserError(
            f"logits_to_keep is of type {kept.dtype} on {kept.device}: give int64 places, or bool for every token"
        )
    if len(shape) > 2 or (len(shape) == 2 and shape[0] != batch):
        raise UserError(f"logits_to_keep has shape {shape}, expected [places] or [{batch}, places]")
    if not values_unknown() and kept.numel():
        least, most = torch.stack(kept.aminmax()).tolist()
        if least < -length or most >= length:
            raise UserError(
                f"logits_to_keep holds places outside of {length} tokens: give 0 to {length - 1}, or -{length} to -1 "
                "counted from the end"
            )


def kept_states(hidden: Tensor, kept: int | Tensor) -> Tensor:
    """The hidden states of some of the tokens.

    Args:
        hidden: ``[B, S, H]``.
        kept: how many tokens at the end, 0 for all, or less for all but so many at the start; or a tensor: places
            ``[n]`` in every sequence, ``[]`` the only one, ``[B, n]`` of each; or bool ``[S]`` or ``[B, S]``.

    Returns:
        ``[B, n, H]``; ``[B, H]`` of the only place; ``[n, H]`` of all tokens that bool ``[B, S]`` marks.
    """
    if not isinstance(kept, Tensor):
        return hidden[:, -kept:]
    if kept.dim() < 2:
        return hidden[:, kept]
    if kept.dtype == torch.bool:
        return hidden[kept]
    places = kept.to(hidden.device, torch.int64) % hidden.shape[1]
    return hidden.take_along_dim(places[..., None], dim=1)
