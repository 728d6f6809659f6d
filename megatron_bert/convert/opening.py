# SPDX-License-Identifier: Apache-2.0
"""From a path to an open checkpoint, and from there into a model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from megatron_bert.convert.archive import archive_tree, is_archive
from megatron_bert.convert.divisions import pad_vocabulary, padded_rows
from megatron_bert.convert.files import FileTree, folder_tree
from megatron_bert.convert.formats import detect_format
from megatron_bert.convert.nemo import NEMO_SETTINGS, NEMO_WEIGHTS
from megatron_bert.convert.options import ReadOptions
from megatron_bert.convert.run_models import finished_model, settings_file
from megatron_bert.convert.state import VOCABULARY_TENSORS, CanonicalState, StateTensor, not_finite
from megatron_bert.model.configuration import CONFIG_NAME, MegatronBertConfig
from parallel.checkpoint import latest_checkpoint
from parallel.errors import UserError, brief
from parallel.sharding import copy_whole
from parallel.simulated_device import has_numbers
from parallel.stored.file_range import FileRange
from parallel.whole_files import reporting

_PLAIN = ReadOptions()
#: Tensor-parallel sizes by which a vocabulary may have been padded.
_TENSOR_SIZES = (1, 2, 4, 8, 16)
#: Folders that the Trainer of transformers writes into its own.
_TRAINER_STEP = re.compile(r"checkpoint-(\d+)")


def _source_tree(source: Path, stack: ExitStack) -> FileTree:
    """The files that a path stands for: those of a folder, of an archive, or one file.

    A run directory stands for the model that the run has left, or for its newest checkpoint; several runs of one
    command for the best of them; a file of weights with settings beside it, Hugging Face's or NeMo's, for its folder.
    """
    if not source.exists():
        link = f"is a symbolic link to {source.readlink()}, which " if source.is_symlink() else ""
        raise UserError(f"{source} {link}is not there: check the path")
    if source.is_dir():
        if not (source / CONFIG_NAME).is_file():
            _refuse_trainers_folder(source)
        folder = finished_model(source)
        return folder_tree(latest_checkpoint(folder / "checkpoints") or folder)
    place = FileRange.whole(source)
    if settings_file(source) is not None:
        return folder_tree(source.parent)
    if is_archive(place):
        return archive_tree(source, stack)
    if (source.parent / NEMO_SETTINGS).is_file() and source.name == NEMO_WEIGHTS:
        return folder_tree(source.parent)
    return FileTree(str(source), {source.name: source})


def _refuse_trainers_folder(source: Path) -> None:
    steps = {int(match[1]): path.name for path in source.iterdir() if (match := _TRAINER_STEP.fullmatch(path.name))}
    if steps:
        names = [steps[step] for step in sorted(steps)]
        raise UserError(
            f"{source} holds no model itself, but {brief(', '.join(names))} of transformers' Trainer: give one, "
            f"such as {source / names[-1]}"
        )


@contextmanager
def open_checkpoint(source: str | Path | CanonicalState, options: ReadOptions = _PLAIN) -> Iterator[CanonicalState]:
    """A checkpoint of any format, opened without reading its tensors.

    Args:
        source: a file, folder or archive; or what is open already, which then stays so.
        options: what it does not say.

    Raises:
        UserError: it is none, is damaged, or contradicts itself.
    """
    if isinstance(source, CanonicalState):
        yield source
        return
    with ExitStack() as stack:
        with reporting("read", source, "check the path"):
            tree = _source_tree(Path(source), stack)
        yield replace(detect_format(tree).read(tree, options), label=tree.label)


class LoadReport(NamedTuple):
    """What loading into a model did.

    Attributes:
        missing: parameters of the model that the checkpoint does not hold; they keep their values.
        unexpected: tensors of the checkpoint that the model, or this part of it, does not have.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    warnings: tuple[str, ...]


@torch.no_grad()
def load_into(model: nn.Module, state: CanonicalState, *, vocab_size: int | None = None) -> LoadReport:
    """Fill the parameters of a model, or of a part of one, from an open checkpoint.

    Each rank of a distributed run reads the tensors it has a part of, one at a time, and keeps its part. Where a run is
    simulated and parameters have no numbers, names and shapes are compared and nothing is read.

    Args:
        model: its parameters carry the canonical names, and may be DTensors over any mesh.
        state: of the checkpoint.
        vocab_size: number of words of the model; ``model.config.vocab_size`` when None.

    Raises:
        UserError: a tensor cannot be read, does not fit the parameter of its name, or holds values that are not finite.
    """
    check_placement(state, getattr(model, "config", state.config))
    parameters = dict(model.named_parameters())
    words = vocab_size if vocab_size is not None else int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    there, usual = state.config.vocab_size, {words, *(padded_rows(words, size) for size in _TENSOR_SIZES)}
    if VOCABULARY_TENSORS & parameters.keys() and there not in usual:
        raise UserError(
            f"the checkpoint has {there} words, but the tokenizer has {words}: use the vocabulary that the model was "
            "trained with"
        )
    for name in [name for name in parameters if name in state]:
        _fill(name, parameters[name], state[name], words)
    return LoadReport(
        missing=tuple(name for name in parameters if name not in state),
        unexpected=tuple(name for name in state if name not in parameters),
        warnings=tuple(state.warnings),
    )


def _fill(name: str, parameter: nn.Parameter, tensor: StateTensor, words: int) -> None:
    shape, rows = tensor.shape, max(words, parameter.shape[0])
    if name in VOCABULARY_TENSORS:
        shape = rows, *shape[1:]
    if shape != parameter.shape:
        raise UserError(
            f"{tensor.origin} has shape {list(shape)}, but the settings make {name} {list(parameter.shape)}: "
            "set the sizes of the model to those of the checkpoint"
        )
    if not has_numbers(parameter):
        return
    values = tensor.load()
    if name in VOCABULARY_TENSORS:
        values = pad_vocabulary(name, values[:words], rows, bias=0.0)
    # A model with NaN in it answers, and every answer is wrong.
    if count := not_finite(values):
        raise UserError(
            f"{tensor.origin} holds {count:,} of {values.numel():,} values that are NaN or infinite: its training "
            "diverged, or the file is damaged; give an earlier checkpoint, or another copy"
        )
    copy_whole(parameter, values)


def check_placement(source: CanonicalState, config: MegatronBertConfig) -> None:
    """The norms of a checkpoint must be where the model has them (UserError)."""
    if source.config.layer_norm_placement != config.layer_norm_placement:
        raise UserError(
            f"the checkpoint is of a {source.config.model_type} model, whose norms are in another place than the "
            f"{config.layer_norm_placement}-layer-norm model's, so its weights would compute something else: use one "
            f"of a {config.model_type} model"
        )
