# SPDX-License-Identifier: Apache-2.0
"""Settings of any kind of run as a workload to plan for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_bert.config import RunSettings, Settings
from megatron_bert.config_file import load_sections, load_settings
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.planning.workload import USUAL_VOCABULARY, Workload, workload_of


@dataclass(frozen=True)
class Planned:
    """A run to plan.

    Attributes:
        notes: what is assumed.
    """

    settings: RunSettings
    workload: Workload
    notes: tuple[str, ...]


def load_planned(path: Path, overrides: list[str]) -> Planned:
    """Read settings of pretrain, finetune or quantize, distinguished by their sections.

    Raises:
        UserError: they cannot be read, or the checkpoint that they start from cannot.
    """
    from megatron_bert.finetuning.start import encoder_config, find_tokenizer

    kind = _kind_of(path)
    if kind is Settings:
        return _pretraining(load_settings(path, overrides))
    settings: Any = load_sections(path, overrides, kind)
    notes = []
    steps = settings.training.steps
    if steps is None:
        steps = 1
        notes.append("training.steps is not set: times are of one step, the number of which depends on the data")
    config = encoder_config(settings, find_tokenizer(settings))
    return Planned(settings, workload_of(settings, config, steps, settings.task.max_length), tuple(notes))


def _kind_of(path: Path) -> Any:
    from megatron_bert.finetuning.settings import FinetuneSettings
    from megatron_bert.quantizing.settings import QuantizeSettings

    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return Settings  # whose reader says what is wrong
    if not isinstance(sections, dict) or "task" not in sections:
        return Settings
    return QuantizeSettings if {"quantization", "distillation", "search"} & set(sections) else FinetuneSettings


def _pretraining(settings: Settings) -> Planned:
    from megatron_bert.training.pretrain import take_sizes

    notes = []
    settings = take_sizes(settings)
    if settings.tokenizer.path.exists():
        tokenizer = load_tokenizer(settings.tokenizer.path, lowercase=settings.tokenizer.lowercase)
        config = settings.model_config_for(tokenizer.vocab_size, tokenizer.pad_id)
    else:
        notes.append(f"{settings.tokenizer.path} is not there: a vocabulary of {USUAL_VOCABULARY:,} is assumed")
        config = settings.model_config_for(USUAL_VOCABULARY, 0)
    return Planned(
        settings, workload_of(settings, config, settings.training.steps, settings.data.seq_length), tuple(notes)
    )
