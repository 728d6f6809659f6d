# SPDX-License-Identifier: Apache-2.0
"""Dataclasses that move between devices as tensors do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Self

import torch
from torch import Tensor


class Movable:
    """A dataclass whose tensors, those in tuples and in others of its kind included, move with it."""

    def to(self, device: torch.device | str, **how: Any) -> Self:
        """The same with its tensors on ``device``; other arguments as of a tensor's method."""
        return self._each(lambda tensor: tensor.to(device, **how))

    def pin_memory(self) -> Self:
        """The same in page-locked memory, so that copies to a device overlap computation."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        changes = {field.name: _changed(getattr(self, field.name), change) for field in fields(self)}  # type: ignore[arg-type]
        return replace(self, **changes)  # type: ignore[type-var]


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, tuple):
        return tuple(_changed(part, change) for part in value)
    if isinstance(value, Movable):
        return value._each(change)
    return change(value) if isinstance(value, Tensor) else value
