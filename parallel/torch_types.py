# SPDX-License-Identifier: Apache-2.0
"""Torch's types of divided tensors and modules, whose import takes a quarter of the time in which a command starts.

Until something has made an object of such a type nothing can be one: no import is needed to know that.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """Whether a tensor is a DTensor."""
    return _is_of("torch.distributed.tensor", "DTensor", value)


def is_fsdp_module(value: object) -> TypeIs[FSDPModule]:
    """Whether FSDP2 divides the parameters of a module."""
    return _is_of("torch.distributed.fsdp", "FSDPModule", value)


def _is_of(module: str, name: str, value: object) -> bool:
    loaded = getattr(sys.modules.get(module), name, None)
    return loaded is not None and isinstance(value, loaded)
