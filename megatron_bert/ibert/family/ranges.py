# SPDX-License-Identifier: Apache-2.0
"""The ranges of a quantized model in a file beside its weights, which stay those of the float model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import nn

from megatron_bert.convert.ranges import RANGES_NAME, parse_ranges
from megatron_bert.ibert.family.quantized import canonical_name
from megatron_bert.ibert.stored_ranges import ranges_of, use_ranges
from megatron_bert.model.directories import directory_path
from parallel.errors import UserError
from parallel.whole_files import reporting, write_text


def save_ranges(model: nn.Module, directory: str | Path) -> None:
    """Write the file beside the weights that ``save_pretrained`` writes; under tensor parallelism on one rank.

    Raises:
        UserError: the model is not quantized.
    """
    ranges = ranges_of(model, partial(canonical_name, model))
    if ranges is None:
        raise UserError(f"{type(model).__name__} has no ranges to save: quantize it first")
    path = directory_path(directory)
    with reporting("written", path, "make room, or give another directory"):
        write_text(path / RANGES_NAME, ranges.as_json())


def load_ranges(model: nn.Module, directory: str | Path, *, force_dequant: str | None = None) -> None:
    """Quantize a model in floating point as the file in a directory says.

    Args:
        model: in floating point; of a public class, or with the names of a pretraining checkpoint.
        directory: with the file.
        force_dequant: in place of that of the file, which it was quantized with.

    Raises:
        UserError: there is none, it is damaged, or the model is quantized already.
    """
    path = directory_path(directory) / RANGES_NAME
    if not path.is_file():
        raise UserError(f"{directory} holds no {RANGES_NAME}: quantize the model with quantize_model, and calibrate it")
    with reporting("read", path, "check its permissions"):
        ranges = parse_ranges(path.read_bytes(), str(path))
    changes = {} if force_dequant is None else {"force_dequant": force_dequant}
    use_ranges(model, ranges, str(path), partial(canonical_name, model), **changes)
