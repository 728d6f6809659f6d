# SPDX-License-Identifier: Apache-2.0
"""Tables of commands that train, and of what settings choose from: optimizers, learning rates' decays, trackers.

Settings are checked against a table as it is when they are read, so a program that adds a line before gets one more
choice. What is slow to load stands here by its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any, NamedTuple

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


class RunKind(NamedTuple):
    """A command that trains, by the places of its parts.

    Attributes:
        purpose: what it does, for the command line.
        settings: class of its settings.
        check: takes them and the number of processes, and gives the layout.
        run: takes them, and gives why the run stopped before its last step.
    """

    purpose: str
    settings: str
    check: str
    run: str


#: Commands that train, by their names.
RUNS = {
    "pretrain": RunKind(
        "pretrain an encoder (alone, or under torchrun)",
        "megatron_bert.config:Settings",
        "megatron_bert.config_checks:check_settings",
        "megatron_bert.training.pretrain:pretrain",
    ),
    "finetune": RunKind(
        "train an encoder for a task (alone, or under torchrun)",
        "megatron_bert.finetuning.settings:FinetuneSettings",
        "megatron_bert.config_checks:check_layout",
        "megatron_bert.finetuning.finetune:finetune",
    ),
    "quantize": RunKind(
        "make a fine-tuned encoder compute in integers, and train it so",
        "megatron_bert.quantizing.settings:QuantizeSettings",
        "megatron_bert.quantizing.settings:check_quantize_layout",
        "megatron_bert.quantizing.quantize:quantize",
    ),
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
