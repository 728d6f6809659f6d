# SPDX-License-Identifier: Apache-2.0
"""I-BERT: BERT encoders in integer arithmetic, and training that is aware of it.

The arithmetic is written down in ``specification.md``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_bert.ibert.calibration import calibrate, freeze_ranges, unfreeze_ranges, update_ranges
from megatron_bert.ibert.quantization import in_mode, named_ranges, quantize_model, quantized_modules, quantizers
from megatron_bert.ibert.quantizer import Quantizer
from megatron_bert.ibert.report import QuantizerReport, as_table, compare_with_float, plot
from megatron_bert.ibert.settings import FORCE_DEQUANT, QuantizationConfig

if TYPE_CHECKING:
    from megatron_bert.ibert.engine.model import IntegerModel

__all__ = [
    "FORCE_DEQUANT",
    "IntegerModel",
    "QuantizationConfig",
    "Quantizer",
    "QuantizerReport",
    "as_table",
    "calibrate",
    "compare_with_float",
    "freeze_ranges",
    "in_mode",
    "named_ranges",
    "plot",
    "quantize_model",
    "quantized_modules",
    "quantizers",
    "unfreeze_ranges",
    "update_ranges",
]


def __getattr__(name: str) -> Any:
    """The engine, imported on first use: it needs the public classes' outputs, and these the modules here."""
    if name != "IntegerModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.engine.model").IntegerModel
