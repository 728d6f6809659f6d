"""The ranges of a quantised model in a file beside its weights.

The weights stay those of the float model, with the names that transformers' classes read; ``quantization.json`` holds
how they were quantised and the range of every quantiser, by its name in a pretraining checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from math import inf
from pathlib import Path
from typing import Any

from torch import nn

from megatron_bert.family.pretrained import RANGES_NAME, DocumentedModel
from megatron_bert.ibert.family.quantized import canonical_name
from megatron_bert.ibert.quantization import quantize_model, quantizers
from megatron_bert.ibert.quantizer import UNKNOWN
from megatron_bert.ibert.settings import QuantizationConfig
from megatron_bert.model.directories import directory_path
from parallel.errors import UserError

#: Of the arithmetic that ranges belong to: see the specification.
VERSION = 2


def save_ranges(model: nn.Module, directory: str | Path) -> None:
    """Write the file beside the weights that ``save_pretrained`` writes; under tensor parallelism on one rank.

    Raises:
        UserError: the model is not quantised.
    """
    found = dict(quantizers(model))
    if not found:
        raise UserError(f"{type(model).__name__} has no ranges to save: quantise it first")
    content = {
        "version": VERSION,
        "settings": asdict(next(iter(found.values())).settings),
        "frozen": all(quantizer.frozen for quantizer in found.values()),
        # A float32 number is exact as a Python float, and that as its shortest text.
        "ranges": {_name(model, name): q.limit() for name, q in found.items() if q.known},
    }
    (directory_path(directory) / RANGES_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_ranges(model: nn.Module, directory: str | Path, *, force_dequant: str | None = None) -> None:
    """Quantise a model in floating point as the file in a directory says.

    The model is of a public class, or has the names of a pretraining checkpoint. Ranges that the file does not hold,
    those of another head, stay to be calibrated; they are not frozen.

    Args:
        model: in floating point.
        directory: with the file.
        force_dequant: in place of that of the file, which it was quantised with.

    Raises:
        UserError: there is none, it is damaged, or the model is quantised already.
    """
    path = directory_path(directory) / RANGES_NAME
    if not path.is_file():
        raise UserError(f"{directory} holds no {RANGES_NAME}: quantise the model with quantize_model, and calibrate it")
    settings, ranges, frozen = _read(path)
    if force_dequant is not None:
        settings = replace(settings, force_dequant=force_dequant)
    quantize_model(model, settings, equalise=False)  # the weights that were saved are equalised already
    for name, quantizer in quantizers(model):
        limit = ranges.get(_name(model, name), UNKNOWN)
        quantizer.range.fill_(limit)
        quantizer.frozen = frozen and quantizer.known


def _name(model: nn.Module, name: str) -> str:
    """The name of a quantizer in a pretraining checkpoint."""
    return canonical_name(model, name) if isinstance(model, DocumentedModel) else name


def _read(path: Path) -> tuple[QuantizationConfig, dict[str, float], bool]:
    known = {field.name for field in fields(QuantizationConfig)}
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        _check_version(path, content.get("version", 1))
        settings = dict(content["settings"])
        ranges = {str(name): float(limit) for name, limit in content["ranges"].items()}
        by_layer = {int(layer): kind for layer, kind in settings.pop("layer_force_dequant", {}).items()}
        if not settings.keys() <= known or not all(0 <= limit < inf for limit in ranges.values()):
            raise ValueError("unknown settings, or a range that is none")
        return QuantizationConfig(**settings, layer_force_dequant=by_layer), ranges, content["frozen"] is True
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({type(error).__name__}): save the quantised model again") from None


def _check_version(path: Path, version: object) -> None:
    if version == VERSION:
        return
    if isinstance(version, int) and version > VERSION:
        raise UserError(f"{path} has version {version}, this is for {VERSION}: load it with a newer megatron-bert")
    raise UserError(
        f"{path} has version {version} of the integer arithmetic, whose numbers are others in version {VERSION}: "
        "quantize the float model again"
    )
