"""Weights in transformers' layout into the model of a task, at any layout of its ranks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_bert.convert.divisions import pad_vocabulary
from megatron_bert.convert.finite import check_finite
from megatron_bert.convert.huggingface import WEIGHTS, open_weights
from megatron_bert.convert.json_files import read_json
from megatron_bert.convert.opening import check_words, copy_whole, source_tree
from megatron_bert.convert.state import TASK_HEADS, VOCABULARY_TENSORS, WORD_EMBEDDINGS, StateTensor
from megatron_bert.family.names import fuse
from megatron_bert.finetuning.families import family_of
from megatron_bert.finetuning.start import finetuned_directory
from megatron_bert.model.configuration import CONFIG_NAME
from megatron_bert.model.finetuning import BertForTask
from parallel.errors import UserError

#: Most names of classes in a message.
_SHOWN = 12
#: How the pooler's parameters begin, which sequences and choices have.
_POOLER = "pair_head."
_INCOMPLETE = "copy all files of the model"
_LAYER = re.compile(r"\.encoder\.layer\.(\d{1,6})\.")


@torch.no_grad()
def load_finetuned(stage: BertForTask, source: Path) -> None:
    """Fill a stage, its head included, from a fine-tuned model in transformers' layout.

    Each rank reads the tensors it has a part of, one at a time, and keeps its part. The rows of the head are put in the
    order of the stage's classes, by name.

    Args:
        stage: its parameters may be DTensors over any mesh.
        source: the model's directory, or the fine-tuning run.

    Raises:
        UserError: it holds no such model, or one for other classes, another kind of labels or another vocabulary.
    """
    with _opened(stage, source) as (described, stored):
        order = _class_order(stage, described, source)
        for name, parameter in stage.named_parameters():
            keys = family_of(stage.config).names.theirs(name)
            if missing := [key for key in keys if key not in stored]:
                head = name.startswith((*TASK_HEADS, _POOLER))
                why = "it was not fine-tuned with this kind of head" if head else _INCOMPLETE
                raise UserError(f"{source} holds no {_shown(stage, missing[0])}: {why}")
            _copy(stage, name, parameter, [stored[key] for key in keys], order)


@torch.no_grad()
def load_encoder(stage: BertForTask, source: Path) -> list[str]:
    """Fill a stage but for its head from a model in transformers' layout; the head keeps its values.

    Args:
        stage: as for :func:`load_finetuned`.
        source: likewise; any class of the stage's family.

    Returns:
        What the user should know.

    Raises:
        UserError: it holds no encoder of these sizes, or another vocabulary.
    """
    notes = []
    with _opened(stage, source) as (_, stored):
        for name, parameter in stage.named_parameters():
            keys = family_of(stage.config).names.theirs(name)
            found = [stored[key] for key in keys if key in stored]
            head = name.startswith(TASK_HEADS)
            if found and head:
                notes.append(f"{name} of {source} is left behind and starts anew (model.keep_head=true takes it)")
            elif len(found) == len(keys):
                _copy(stage, name, parameter, found, None)
            elif head or name.startswith(_POOLER):
                notes.append(f"{name} is not in {source} and starts anew")
            else:
                missing = next(key for key in keys if key not in stored)
                raise UserError(f"{source} holds no {_shown(stage, missing)}: {_INCOMPLETE}")
    return notes


@contextmanager
def _opened(stage: BertForTask, source: Path) -> Iterator[tuple[dict[str, Any], dict[str, StateTensor]]]:
    """config.json, and the tensors by the names that the family's classes with a head have in transformers."""
    config, names = stage.config, family_of(stage.config).names
    with ExitStack() as stack:
        tree = source_tree(finetuned_directory(source), stack)
        if not any(name in tree for name in WEIGHTS):
            raise UserError(f"{source} holds no weights: give a fine-tuning run, or the directory of a model")
        if CONFIG_NAME not in tree:
            raise UserError(f"{source} holds no {CONFIG_NAME}: copy all files of the model")
        stored = {names.with_prefix(key): tensor for key, tensor in open_weights(tree)[0].items()}
        if (table := stored.get(names.theirs(WORD_EMBEDDINGS)[0])) is not None and table.shape:
            check_words(table.shape[0], config.vocab_size)
        layers = 1 + max((int(found[1]) for key in stored if (found := _LAYER.search(key))), default=-1)
        if layers > config.num_hidden_layers:
            raise UserError(
                f"{source} has {layers} layers, but its {CONFIG_NAME} says {config.num_hidden_layers}: settings and "
                "weights are of two models"
            )
        yield read_json(tree[CONFIG_NAME]), stored


def _copy(
    stage: BertForTask, name: str, parameter: nn.Parameter, tensors: list[StateTensor], order: Tensor | None
) -> None:
    """Fill a parameter from one tensor, or from query, key and value; ``order`` is that of the head's rows."""
    shape = (parameter.shape[0] // len(tensors), *parameter.shape[1:])
    by_word = name in VOCABULARY_TENSORS  # their number is checked already
    for tensor in tensors:
        if not tensor.dtype.is_floating_point:
            raise UserError(f"{tensor.origin} holds {tensor.dtype} values: expected floating point")
        if tensor.shape != shape and not (by_word and tensor.shape[1:] == shape[1:]):
            head = name.startswith(f"{stage.output_name}.")
            why = "it was fine-tuned for other classes" if head else "settings and weights are of two models"
            raise UserError(
                f"{tensor.origin} has shape {list(tensor.shape)}, but the task makes it {list(shape)}: {why}"
            )
    loaded = [tensor.load() for tensor in tensors]
    for tensor, part in zip(tensors, loaded, strict=True):
        check_finite(part, tensor.origin)
    values = fuse(loaded, stage.config.head_dim)
    if by_word:
        words = stage.config.vocab_size
        values = pad_vocabulary(name, values[:words], max(words, parameter.shape[0]), bias=0.0)
    copy_whole(parameter, values if order is None or not name.startswith(f"{stage.output_name}.") else values[order])


def _shown(stage: BertForTask, key: str) -> str:
    """The name of a tensor in transformers' files without the family's in front, which differs."""
    return key.removeprefix(f"{family_of(stage.config).names.prefix}.")


def _class_order(stage: BertForTask, described: dict[str, Any], source: Path) -> Tensor | None:
    """For each class of a stage its row in the head of a fine-tuned model; None where the rows stay as they are.

    Args:
        stage: for the task.
        described: config.json of the model.
        source: the model, for messages.

    Raises:
        UserError: the model was fine-tuned for other classes, or another kind of labels.
    """
    problem = stage.config.problem_type
    theirs = described.get("problem_type")
    if problem is not None and theirs is not None and theirs != problem:
        raise UserError(f"{source} was fine-tuned for {theirs}, but the task is {problem}: start from a model for it")
    named = described.get("id2label")
    if stage.kind not in ("sequence", "token") or problem == "regression" or not isinstance(named, dict):
        return None
    assert stage.config.id2label is not None
    wanted = [name for _, name in sorted(stage.config.id2label.items())]
    try:
        rows = {str(name): int(number) for number, name in named.items()}
    except ValueError as error:
        raise UserError(f"id2label in {source} is damaged ({error}): copy the model again") from None
    for same in (str, str.casefold):  # ENTAILMENT is entailment, if nothing is entailment itself
        mine, theirs_by_name = [same(name) for name in wanted], {same(name): row for name, row in rows.items()}
        if sorted(theirs_by_name) == sorted(mine) and sorted(theirs_by_name.values()) == list(range(len(mine))):
            return torch.tensor([theirs_by_name[name] for name in mine])
    if all(name == f"LABEL_{number}" for name, number in rows.items()):
        return None  # names that nobody gave
    raise UserError(
        f"{source} was fine-tuned for the classes {_listed(rows)}, but the task has {_listed(wanted)}: set task.labels "
        "to the names there, in any order"
    )


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
