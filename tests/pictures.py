# SPDX-License-Identifier: Apache-2.0
"""What draws the findings of a run, so that tests can leave it out: it takes longer than to train a tiny model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: PYTHONPATH of programs that are started to draw nothing, and to look for no garbage among what they import.
WITHOUT_PICTURES = os.pathsep.join(map(str, (ROOT / "tests" / "integration" / "held", ROOT)))

#: Functions of ``megatron_bert`` that draw what a run has found.
_DRAWING = (
    "training.pretrain.draw_curves",
    "finetuning.finetune.draw_run",
    "finetuning.results.draw_confusion",
    "finetuning.summary.draw_runs",
    "quantizing.quantize.plot",
)


def leave_out_pictures(set_: Callable[[Any, str, Any], None] = setattr) -> dict[str, Any]:
    """Let the modules that are loaded draw nothing; returns what drew, by its place."""
    drawing = {}
    for place in _DRAWING:
        module, _, name = f"megatron_bert.{place}".rpartition(".")
        if loaded := sys.modules.get(module):
            drawing[f"{module}.{name}"] = getattr(loaded, name)
            set_(loaded, name, lambda target, *_, **__: target)
    return drawing
