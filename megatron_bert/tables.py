# SPDX-License-Identifier: Apache-2.0
"""Tables of what settings choose from by name: optimizers, the shapes of a decaying learning rate, and trackers.

Settings are checked against a table as it is when they are read, so a program that adds a line before gets one more
choice. What is slow to load stands here by its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

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
#: logging.trackers, each by the name of its library -> where the
#: :class:`~megatron_bert.training.trackers.Tracker` is.
TRACKERS: dict[str, str] = {
    "wandb": "megatron_bert.training.trackers:WandbTracker",
    "mlflow": "megatron_bert.training.trackers:MlflowTracker",
}


class one_of:  # noqa: N801 (it reads as a function)
    """What a setting's annotation holds beside ``str``, for names of a table and some others."""

    def __init__(self, table: Collection[str], *more: str) -> None:
        self._table, self._more = table, more

    @property
    def names(self) -> list[str]:
        """All choices there are now."""
        return [*self._table, *self._more]

    def _checked(self, name: str) -> str:
        if name not in self.names:
            raise PydanticCustomError("one_of", "choose one of {names}", {"names": ", ".join(self.names)})
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "enum": self.names}


def found_at(place: str) -> Any:
    """What stands at ``module:name``."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
