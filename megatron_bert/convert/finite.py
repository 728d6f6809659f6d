# SPDX-License-Identifier: Apache-2.0
"""Weights are looked at when they are loaded for use: a model with NaN in it answers, and every answer is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.errors import UserError


def check_finite(values: Tensor, origin: str) -> None:
    """Refuse values that are NaN or infinite.

    Args:
        values: of a tensor that was read.
        origin: where it comes from, for the message.

    Raises:
        UserError: some are.
    """
    if not torch.isfinite(values).all():
        count = int((~torch.isfinite(values)).sum())
        raise UserError(
            f"{origin} holds {count:,} of {values.numel():,} values that are NaN or infinite: its training diverged, "
            "or the file is damaged; give an earlier checkpoint, or another copy"
        )
