# SPDX-License-Identifier: Apache-2.0
"""Settings and objectives of planning tests, without files."""

from __future__ import annotations

from pathlib import Path

from megatron_bert.config import Settings
from megatron_bert.config_file import load_settings
from megatron_bert.planning.dry_run import dry_run_rank, longest_batch
from megatron_bert.planning.measuring import StepMeasurement
from megatron_bert.training.pretraining import Pretraining

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


class Vocabulary:
    """A tokenizer of which nothing but its size is asked."""

    vocab_size, pad_id, fingerprint = 1000, 0, ""


def settings_of(*overrides: str, config: str = "bert_345m") -> Settings:
    """A shipped file's settings, small and without compiled layers unless the overrides say otherwise."""
    small = [
        "model.hidden_size=64",
        "model.num_hidden_layers=4",
        "model.num_attention_heads=4",
        "data.seq_length=32",
        "training.compile=false",
        "training.global_batch_size=32",
        "training.micro_batch_size=4",
    ]
    return load_settings(CONFIGS / f"{config}.yaml", [*small, *overrides])


def measured(settings: Settings, rank: int, world_size: int) -> StepMeasurement:
    """A dry run of one rank."""

    def objective(own: Settings) -> Pretraining:
        return Pretraining(own, Vocabulary())  # type: ignore[arg-type]

    return dry_run_rank(settings, objective, longest_batch(settings), rank, world_size)
