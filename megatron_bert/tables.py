# SPDX-License-Identifier: Apache-2.0
"""Tables of what settings choose from by name: optimizers and the shapes of a decaying learning rate.

Settings are checked against a table as it is when they are read, so a program that adds a line before gets one more
choice. What is slow to load stands here by its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

#: optimizer.name -> where the :class:`~megatron_bert.training.update_rules.UpdateRule` is.
OPTIMIZERS: dict[str, str] = {
    "adamw": "megatron_bert.training.update_rules:AdamW",
    "lamb": "megatron_bert.training.update_rules:Lamb",
}
#: learning_rate.schedule and wsd_decay_shape -> the share that is left of peak minus minimum, by the progress of the
#: decay from 0 to 1.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
}


def one_of(table: Collection[str], *more: str) -> Any:
    """What a setting's annotation holds beside ``str``, for names of a table and some others."""

    def check(name: str) -> str:
        if name not in table and name not in more:
            raise PydanticCustomError("one_of", "choose one of {names}", {"names": ", ".join([*table, *more])})
        return name

    return AfterValidator(check)


def found_at(place: str) -> Any:
    """What stands at ``module:name``."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
