# SPDX-License-Identifier: Apache-2.0
"""Weights of a checkpoint into the model of a task, at any layout of its ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megatron_bert.convert.opening import load_into, open_checkpoint
from megatron_bert.convert.state import CanonicalState, StateTensor
from megatron_bert.model.finetuning import BertForTask
from parallel.errors import UserError, first_of

#: Most names of classes in a message.
_SHOWN = 12


def load_finetuned(stage: BertForTask, source: Path | CanonicalState) -> list[str]:
    """Fill a stage, its head included, from a fine-tuned model; what the user should know.

    Each rank reads the tensors it has a part of, one at a time, and keeps its part. The rows of the head are put in the
    order of the stage's classes, by name. Parameters of the stage may be DTensors over any mesh.

    Raises:
        UserError: it holds no such model, or one for other classes, another kind of labels or another vocabulary.
    """
    with open_checkpoint(source) as state:
        report = load_into(stage, replace(state, tensors={**state.tensors, **_rows(stage, state)}))
        return [*report.warnings, *_left_behind(state)]


def _rows(stage: BertForTask, source: CanonicalState) -> dict[str, StateTensor]:
    """The last layer of a fine-tuned model's head, its rows in the order of a stage's classes."""
    order = _class_order(stage, source)
    names = [name for name, _ in stage.named_parameters()]
    missing = next((name for name in names if name not in source), None)
    if missing is not None or source.head not in (None, stage.head_kind.name):
        wanted = (
            missing or f"head for a task of this kind ({stage.head_kind.name}), but one for another ({source.head})"
        )
        raise UserError(f"{source.label} holds no {wanted}: it was not fine-tuned with this kind of head")
    rows = {}
    for name in (f"{stage.output_name}.{kind}" for kind in ("weight", "bias")):
        if name in names:
            rows[name] = source[name] if order is None else source[name].mapped(lambda values: values[order])
            shape = stage.get_parameter(name).shape
            source[name].expect(shape, "the task makes it", "it was fine-tuned for other classes")
    return rows


def load_encoder(stage: BertForTask, source: Path | CanonicalState) -> list[str]:
    """Fill a stage but for its head, which keeps its values, as :func:`load_finetuned` does; what the user should know.

    Raises:
        UserError: it holds no encoder of these sizes, or another vocabulary.
    """
    with open_checkpoint(source) as state:
        report = load_into(stage, state.without_head())
        notes = [
            f"{name} of {state.label} is left behind and is initialized from scratch (model.keep_head=true takes it)"
            if name in state.task_head
            else f"{name} is not in {state.label} and is initialized from scratch"
            for name in report.missing
        ]
        return [*report.warnings, *notes, *_left_behind(state)]


def _left_behind(source: CanonicalState) -> list[str]:
    if source.ranges is None:
        return []
    return [f"{source.label} is quantized: its weights are taken in floating point, and its ranges are left behind"]


def _class_order(stage: BertForTask, source: CanonicalState) -> torch.Tensor | None:
    """For each class of a stage its row in the head of a fine-tuned model; None where the rows stay as they are."""
    problem, theirs = stage.config.problem_type, source.config.problem_type
    if problem is not None and theirs is not None and theirs != problem:
        raise UserError(
            f"{source.label} was fine-tuned for {theirs}, but the task is {problem}: start from a model for it"
        )
    named = source.config.id2label or {}
    unnamed = all(name == f"LABEL_{number}" for number, name in named.items())  # names that nobody gave
    if stage.head_kind.outputs is not None or problem == "regression" or unnamed:
        return None
    assert stage.config.id2label is not None
    wanted = [name for _, name in sorted(stage.config.id2label.items())]
    rows = {name: number for number, name in named.items()}
    for same in (str, str.casefold):  # ENTAILMENT is entailment, if nothing is entailment itself
        mine, theirs_by_name = [same(name) for name in wanted], {same(name): row for name, row in rows.items()}
        if sorted(theirs_by_name) == sorted(mine) and sorted(theirs_by_name.values()) == list(range(len(mine))):
            return torch.tensor([theirs_by_name[name] for name in mine])
    raise UserError(
        f"{source.label} was fine-tuned for the classes {first_of(rows, _SHOWN)}, but the task has "
        f"{first_of(wanted, _SHOWN)}: set task.labels to the names there, in any order"
    )
