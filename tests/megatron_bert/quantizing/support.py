# SPDX-License-Identifier: Apache-2.0
"""A small fine-tuned model, and runs that quantize it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_bert.finetuning.finetune import finetune
from megatron_bert.quantizing.settings import QuantizeSettings
from tests.megatron_bert.finetuning.support import make_run, run_settings


def make_model(folder: Path, **changes: Any) -> Path:
    """The run of a float model that has learned something."""
    settings = make_run(
        folder,
        training__epochs=8,
        training__evaluate_every=20,
        training__micro_batch_size=16,
        learning_rate__peak=1e-3,
        model__hidden_dropout_prob=0.0,
        model__attention_probs_dropout_prob=0.0,
        logging__every=20,
        **changes,
    )
    finetune(settings)
    return folder / "run"


def quantize_settings(folder: Path, **changes: Any) -> QuantizeSettings:
    """Settings of a run over the model of :func:`make_model`.

    Args:
        folder: of the model and its data.
        **changes: values by ``section__key``.
    """
    tree = run_settings(folder).model_dump(by_alias=True)
    tree["model"] = {"from": folder / "run"}
    tree["quantization"], tree["distillation"], tree["search"] = {"calibration_steps": 3, "report_steps": 1}, {}, {}
    tree["learning_rate"] = {"peak": 1e-4}
    tree["training"] |= {"run_dir": folder / "quantized", "steps": 6, "evaluate_every": 3}
    for name, value in changes.items():
        section, key = name.split("__")
        tree[section][key] = value
    return QuantizeSettings.model_validate(tree)
