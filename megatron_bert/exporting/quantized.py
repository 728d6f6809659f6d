# SPDX-License-Identifier: Apache-2.0
"""Loading a quantized model of any public class from its directory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import megatron_bert
from megatron_bert.convert.run_models import MODEL_FOLDER
from megatron_bert.ibert.family.ranges import RANGES_NAME, load_ranges
from megatron_bert.ibert.quantization import is_quantized
from megatron_bert.json_file import read_json
from megatron_bert.model.configuration import CONFIG_NAME
from parallel.errors import UserError, brief
from parallel.stored.file_range import FileRange


def quantized_directory(source: Path) -> Path:
    """The directory of a quantized model: itself, or that of a run.

    Raises:
        UserError: there is none.
    """
    for directory in (source, source / MODEL_FOLDER):
        if (directory / RANGES_NAME).is_file() and (directory / CONFIG_NAME).is_file():
            return directory
    if not source.exists():
        raise UserError(f"{source} is not there: check the path")
    raise UserError(
        f"{source} holds no {RANGES_NAME} beside a {CONFIG_NAME}: give a run of `megatron-bert quantize`, or a "
        "quantized model that was saved with its ranges"
    )


def load_quantized(directory: Path) -> Any:
    """A model of the class that wrote it, in integers.

    Raises:
        UserError: it is of no class here, or damaged.
    """
    stated = read_json(FileRange.whole(directory / CONFIG_NAME)).get("architectures")
    name = stated[0] if isinstance(stated, list) and len(stated) == 1 else stated
    if not isinstance(name, str) or name not in megatron_bert.__all__ or not name.startswith(("MegatronBert", "IBert")):
        raise UserError(
            f"{directory / CONFIG_NAME} has architectures {brief(stated)}: expected the name of one class of this "
            "package, as its save_pretrained writes it"
        )
    with _without_the_note_on_ranges():
        model = getattr(megatron_bert, name).from_pretrained(directory)
    if not is_quantized(model):
        load_ranges(model, directory)
    return model.eval()


@contextmanager
def _without_the_note_on_ranges() -> Iterator[None]:
    logger = logging.getLogger("megatron_bert.family.pretrained")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
