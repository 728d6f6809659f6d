# SPDX-License-Identifier: Apache-2.0
"""I-BERT: BERT encoders in integer arithmetic, and training that is aware of it.

The arithmetic is written down in ``specification.md``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_bert.ibert.calibration import calibrate, freeze_ranges, unfreeze_ranges, update_ranges
    from megatron_bert.ibert.engine.model import IntegerModel
    from megatron_bert.ibert.engine.native_model import NativeModel
    from megatron_bert.ibert.quantization import in_mode, named_ranges, quantize_model, quantized_modules, quantizers
    from megatron_bert.ibert.quantizer import Quantizer
    from megatron_bert.ibert.report import QuantizerReport, as_table, compare_with_float, plot
    from megatron_bert.ibert.settings import FORCE_DEQUANT, QuantizationConfig

__all__ = [
    "FORCE_DEQUANT",
    "IntegerModel",
    "NativeModel",
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

#: Where the public names live. They are imported on first use: serving needs none of training's, nor torch.
_HOMES = {
    "FORCE_DEQUANT": "settings",
    "IntegerModel": "engine.model",
    "NativeModel": "engine.native_model",
    "QuantizationConfig": "settings",
    "Quantizer": "quantizer",
    "QuantizerReport": "report",
    "as_table": "report",
    "calibrate": "calibration",
    "compare_with_float": "report",
    "freeze_ranges": "calibration",
    "in_mode": "quantization",
    "named_ranges": "quantization",
    "plot": "report",
    "quantize_model": "quantization",
    "quantized_modules": "quantization",
    "quantizers": "quantization",
    "unfreeze_ranges": "calibration",
    "update_ranges": "calibration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
