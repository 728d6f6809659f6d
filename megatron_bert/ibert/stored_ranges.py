# SPDX-License-Identifier: Apache-2.0
"""From the ranges that files hold to a quantized model, and back."""

from __future__ import annotations

import json
from collections.abc import Callable

from torch import nn

from megatron_bert.convert.ranges import Ranges
from megatron_bert.ibert.quantization import quantize_model, quantizers
from megatron_bert.ibert.quantizer import UNKNOWN
from megatron_bert.ibert.settings import QuantizationConfig
from parallel.errors import UserError


def ranges_of(model: nn.Module, canonical: Callable[[str], str]) -> Ranges | None:
    """The ranges of a model; None of one that is not quantized.

    Args:
        model: of any class.
        canonical: the name in a training checkpoint of one of its quantizers.
    """
    found = dict(quantizers(model))
    if not found:
        return None
    return Ranges(
        # As JSON has them, whose keys are texts.
        settings=json.loads(json.dumps(next(iter(found.values())).settings.model_dump())),
        limits={canonical(name): quantizer.limit() for name, quantizer in found.items() if quantizer.known},
        frozen=all(quantizer.frozen for quantizer in found.values()),
    )


def use_ranges(
    model: nn.Module, ranges: Ranges, label: str, canonical: Callable[[str], str] | None = None, **changes: str
) -> None:
    """Quantize a model in floating point; ranges that are not known, those of another head, stay to be calibrated.

    Args:
        model: with the weights that were saved, which are equalized already.
        ranges: of it.
        label: what holds them, for messages.
        canonical: the name in a training checkpoint of one of its quantizers; None where they are the same.
        **changes: settings in place of those of the ranges.

    Raises:
        UserError: the settings are none, or the model is quantized already.
    """
    quantize_model(model, quantization_config(ranges, label, **changes), equalize=False)
    for name, quantizer in quantizers(model):
        limit = ranges.limits.get(name if canonical is None else canonical(name), UNKNOWN)
        quantizer.range.fill_(limit)
        quantizer.frozen = ranges.frozen and quantizer.known


def quantization_config(ranges: Ranges, label: str, **changes: str) -> QuantizationConfig:
    """How a model was quantized.

    Raises:
        UserError: its file, ``label``, says something else.
    """
    values = {**ranges.settings, **changes}
    try:
        by_layer = {int(layer): kind for layer, kind in values.pop("layer_force_dequant", {}).items()}
        if not values.keys() <= QuantizationConfig.model_fields.keys():
            raise ValueError("unknown settings")
        return QuantizationConfig(**values, layer_force_dequant=by_layer)
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{label} is damaged ({type(error).__name__}): save the quantized model again") from None
