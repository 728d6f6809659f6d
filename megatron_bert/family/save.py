"""Weights of a model of any head and tensor-parallel size into a directory of transformers' layout."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_bert.family.kinds import check_filled
from megatron_bert.family.names import separate
from megatron_bert.model.directories import made_directory
from megatron_bert.model.resharding import undivided
from parallel.errors import UserError
from parallel.whole_files import reporting

if TYPE_CHECKING:
    from megatron_bert.family.pretrained import PreTrainedModel

WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
#: File of a quantised model's ranges, which megatron_bert.ibert writes and reads.
RANGES_NAME = "quantization.json"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "B": 1, "": 1}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", re.IGNORECASE)
_OLD = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@dataclass
class _Shard:
    """Parameters of one file."""

    names: list[str] = field(default_factory=list)
    nbytes: int = 0


def save_model(model: PreTrainedModel, directory: Path, max_shard_size: int | str) -> None:
    """Write ``config.json`` and safetensors; every tensor rank calls, the first writes.

    Raises:
        UserError: a size that is none, no directory, or a model without values.
    """
    check_filled(model)
    shards = _divide(model, _bytes(max_shard_size))
    first = model.tp.rank == 0
    if first:
        made_directory(directory)
        for path in directory.iterdir():
            if _OLD.fullmatch(path.name):
                path.unlink()  # else a reader would mix the shards of two models
        kind = str(model.dtype).removeprefix("torch.")
        config = replace(model.saved_config(), torch_dtype=kind)
        config.save_pretrained(directory, architecture=type(model).__name__)
        model.save_beside(directory)
    parameters = dict(model.named_parameters())
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in shard.names:
            whole = undivided(parameters[name])
            if first:
                tensors |= _theirs(model, name, whole)
        if first:
            if number == len(shards):
                tensors |= _own_names(model, model.extra_tensors())
            with reporting("written", directory, "make room, or give another directory"):
                _write(tensors, directory / file)
            weight_map |= dict.fromkeys(tensors, file)
    if first and len(shards) > 1:
        index = {"metadata": {"total_size": sum(shard.nbytes for shard in shards)}, "weight_map": weight_map}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # what the file system refuses is in its words
        path.unlink(missing_ok=True)
        raise OSError(0, str(error), str(path)) from None


def _theirs(model: PreTrainedModel, name: str, whole: Tensor) -> dict[str, Tensor]:
    """A parameter under transformers' names, without padding of the vocabulary."""
    keys = model.names.theirs(name)
    whole = whole[: model.config.vocab_size] if model.has_words(name) else whole
    tensors = dict(zip(keys, separate(whole, len(keys), model.config.head_dim), strict=True))
    if keys == (model.names.output_bias,) and not model.config.tie_word_embeddings:
        tensors[model.names.output_bias_copy] = whole
    return _own_names(model, tensors)


def _own_names(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are written; the names of the bare encoder have no prefix."""
    cut = f"{model.names.prefix}." if model.base_model is model else ""
    return {key.removeprefix(cut): tensor.cpu().clone().contiguous() for key, tensor in tensors.items()}


def _divide(model: PreTrainedModel, limit: int) -> list[_Shard]:
    shards = [_Shard()]
    for name, parameter in model.named_parameters():
        nbytes = parameter.numel() * parameter.element_size()
        if shards[-1].names and shards[-1].nbytes + nbytes > limit:
            shards.append(_Shard())
        shards[-1].names.append(name)
        shards[-1].nbytes += nbytes
    return shards


def _bytes(size: int | str) -> int:
    match = _SIZE.fullmatch(str(size))
    if match is None or match[2].upper() not in _UNITS:
        raise UserError(f"max_shard_size is {size!r}: give bytes, or a number with KB, MB or GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
