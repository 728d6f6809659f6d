# SPDX-License-Identifier: Apache-2.0
"""Going on from a checkpoint with other settings: what is refused, and what the user should know of the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_bert.config import RunSettings
from megatron_bert.convert.native import CONFIG_FIELDS, CONFIG_KEY
from megatron_bert.model.activations import same_activation
from megatron_bert.model.configuration import MegatronBertConfig
from parallel.errors import UserError

#: Settings, by the beginning of their names, that change no result but by rounding.
INCIDENTAL = (
    "parallel.",
    "logging.",
    "checkpoint.",
    "training.run_dir",
    "training.device",
    "training.max_minutes",
    "training.micro_batch_size",
    "training.recompute",
    "training.compile",
    "training.cuda_graphs",
    "data.workers",
    "data.cache_dir",
    "quantization.report_steps",
)
#: Fields of the configuration that the function of given weights does not depend on.
_OF_TRAINING = ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "scaled_output_init")
#: Fields that are compared in ways of their own, beside the activation.
_SPECIAL = ("vocab_size_multiple", "binary_head")
_LONGEST = 80


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``section.key`` -> value of the settings of a run as JSON holds them, without the incidental ones."""
    flat = {
        f"{section}.{key}": value
        for section, values in settings.items()
        for key, value in (values if isinstance(values, dict) else {"": values}).items()
    }
    return {name: value for name, value in flat.items() if not name.startswith(INCIDENTAL)}


def check_resume(
    settings: RunSettings, config: MegatronBertConfig, fixed: Iterable[str], state: Mapping[str, Any], path: Path
) -> list[str]:
    """Refuse to go on as another model or another kind of run; a sentence for each other setting that has changed.

    Args:
        fixed: beginnings of the names of settings that this kind of run cannot change on the way.
        state: what the checkpoint says beside its tensors.

    Raises:
        UserError: the function or the kind of the run would be another one.
    """
    written = state.get("settings")
    before = written if isinstance(written, dict) else {}
    now = settings.as_json()
    if before and _command(before) != _command(now):
        raise UserError(
            f"checkpoint {path} was written by `{_command(before)}`, and `{_command(now)}` cannot go on from it: set "
            "another training.run_dir, and model.from to start from its weights"
        )
    notes = list(_changes(flat_settings(before), flat_settings(now), tuple(fixed), state["step"], path))
    _check_function(config, state.get(CONFIG_KEY) or before.get("model") or {}, path)
    return notes


def _command(settings: Mapping[str, Any]) -> str:
    """Which command the settings are of."""
    return "quantize" if "quantization" in settings else "finetune" if "task" in settings else "pretrain"


def _check_function(config: MegatronBertConfig, stored: Mapping[str, Any], path: Path) -> None:
    """The weights must go on as the function that they were trained as."""
    for name in CONFIG_FIELDS:
        there, here = stored.get(name), getattr(config, name)
        if name not in stored or name in (*_OF_TRAINING, *_SPECIAL) or there == here:
            continue
        if name == "hidden_act" and same_activation(str(there), here):
            continue
        if name == "intermediate_size" and there is None:  # in settings alone: four times the hidden size
            continue
        raise UserError(
            f"checkpoint {path} is of a model with {name} {there}, but now {name} is {here}: set it to {there} to go "
            "on, or set another training.run_dir to train another model"
        )
    multiple = stored.get("vocab_size_multiple", config.vocab_size_multiple)
    if -(-config.vocab_size // multiple) * multiple != config.padded_vocab_size:
        raise UserError(
            f"checkpoint {path} has a vocabulary padded to a multiple of {multiple} words, but now "
            f"model.vocab_size_multiple is {config.vocab_size_multiple}: set it to {multiple} to go on"
        )
    if config.binary_head and stored.get("binary_head") is False:
        raise UserError(
            f"checkpoint {path} has no sentence-pair head to go on with: leave data.pair_objective=none as it was, or "
            "set model.from to the checkpoint in another training.run_dir"
        )


def _changes(
    before: Mapping[str, Any], now: Mapping[str, Any], fixed: tuple[str, ...], step: int, path: Path
) -> Iterator[str]:
    """A sentence for each setting that is not as it was, and not checked as part of the model or the identity."""
    checked = {f"model.{name}" for name in CONFIG_FIELDS if name not in _OF_TRAINING}
    for name, value in now.items():
        if name not in before or before[name] == value or name in checked or name.startswith("tokenizer."):
            continue
        there, here = _brief(before[name]), _brief(value)
        moved = name == "model.from" and None not in (before[name], value)
        if moved and os.path.realpath(before[name]) == os.path.realpath(value):
            continue
        # A checkpoint that was started from, and is gone since, may have been moved.
        if name.startswith(fixed) and not (moved and not Path(before[name]).exists()):
            raise UserError(
                f"{name} is {here}, but the run that wrote {path} had {there}, which it cannot change on the way: set "
                "it as it was, or set another training.run_dir"
            )
        yield f"{name} is {here}, was {there} up to step {step}"


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
