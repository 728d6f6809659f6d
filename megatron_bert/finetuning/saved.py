# SPDX-License-Identifier: Apache-2.0
"""A fine-tuned model as a directory: weights and settings that transformers reads, the vocabulary and the task."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_bert.config_file import validated
from megatron_bert.config_sections import TokenizerSettings
from megatron_bert.convert.files import folder_tree
from megatron_bert.convert.huggingface import TASK_NAME, WEIGHTS, HuggingFace, settings_alone
from megatron_bert.convert.native import HOW_TO_READ
from megatron_bert.convert.opening import open_checkpoint
from megatron_bert.convert.options import WriteOptions
from megatron_bert.convert.ranges import Ranges
from megatron_bert.convert.run_models import finished_model
from megatron_bert.convert.state import CanonicalState, StateTensor
from megatron_bert.convert.tokenizer_files import check_vocabulary, find_vocabulary, save_tokenizer
from megatron_bert.finetuning.deduced import changed_settings, deduced_settings, deduction_note
from megatron_bert.finetuning.integer import IntegerTask, integer_task
from megatron_bert.finetuning.start import check_lengths
from megatron_bert.finetuning.weights import load_finetuned
from megatron_bert.ibert.activations import INTEGER_ACTIVATIONS
from megatron_bert.ibert.engine.parts import plan_of
from megatron_bert.ibert.engine.plan_file import PLAN_NAME, write_plan
from megatron_bert.ibert.stored_ranges import use_ranges
from megatron_bert.model.configuration import MegatronBertConfig, numbered_labels
from megatron_bert.model.finetuning import BertForTask
from megatron_bert.model.task_heads.table import HEADS
from megatron_bert.tasks.encoding import input_format
from megatron_bert.tasks.registry import restore_task
from megatron_bert.tasks.settings import TaskDataSettings, TaskSettings
from megatron_bert.tasks.task import Task
from parallel.errors import UserError
from parallel.process_group import launched_rank

_NO_VOCABULARY = "give tokenizer.path=PATH, the one that its model was trained with"


class SavedTask(NamedTuple):
    """A fine-tuned model, ready to predict.

    Attributes:
        model: with its weights; None where there is an integer plan alone.
        task: with the model's tokenizer.
        directory: it was loaded from.
    """

    model: BertForTask | None
    task: Task
    directory: Path

    def stage(self, backend: str = "torch", threads: int | None = None) -> BertForTask | IntegerTask:
        """What computes: the model itself, or an integer engine of its plan.

        Args:
            backend: ``torch``; ``integer``, the fastest engine that runs here; or an engine's name.

        Raises:
            UserError: an engine is asked for a float model.
        """
        if backend != "torch":
            return integer_task(self.model, self.task.head, self.directory, backend, threads)
        if threads is not None:
            raise UserError("--threads is of integer engines: give --backend integer too")
        if self.model is None:
            raise UserError(f"{self.directory} holds an integer plan and no weights: give --backend integer")
        return self.model


def task_config(config: MegatronBertConfig, task: Task, **changes: Any) -> MegatronBertConfig:
    """The configuration of an encoder with a task's tokenizer and classes, and further fields that are changed."""
    head, labels = task.head, dict(enumerate(task.labels))
    fields = {"vocab_size": task.tokenizer.vocab_size, "pad_token_id": task.tokenizer.pad_id} | changes
    classes = labels or numbered_labels(max(head.outputs, 1))
    return replace(config, **fields, id2label=classes, problem_type=head.problem)


def save_task(
    checkpoint: Path, config: MegatronBertConfig, task: Task, directory: Path, computed_in: torch.dtype = torch.float32
) -> None:
    """Write the model of a checkpoint of a fine-tuning run as a directory; one process, whatever layout trained it.

    Tensors pass through memory one by one. Ranges of a quantized model are written beside them.

    Args:
        directory: to write; empty, or not there.
        computed_in: number format in which a quantized model saw its parameters, which are rounded to it, so that what
            is saved has the integers that were trained and scored.
    """
    # What a file to evaluate on shares with the training file.
    how = task.data.model_dump(mode="json", include=set(HOW_TO_READ), exclude_defaults=True)
    described = task.describe() | {"columns": how}
    directory.mkdir(parents=True, exist_ok=True)
    with open_checkpoint(checkpoint) as found:
        state = replace(found, config=config, head=task.head.kind, task=described)
        if state.ranges is not None:
            state = replace(state, tensors={name: _rounded(tensor, computed_in) for name, tensor in state.items()})
        HuggingFace().write(state, directory, WriteOptions())
        if state.ranges is not None and _in_engines(state.ranges, config, task):
            write_plan(plan_of(_model(state, config, task)), directory / PLAN_NAME)
    save_tokenizer(task.tokenizer, directory, config.longest_sequence, roberta=config.like_roberta)


def _model(state: CanonicalState, config: MegatronBertConfig, task: Task) -> BertForTask:
    """With its weights, and in integers if it is quantized."""
    model = BertForTask(config, task.head.kind, task.head.outputs)
    load_finetuned(model, state)
    if state.ranges is not None:
        use_ranges(model, state.ranges, state.label)
    return model.eval()


def _rounded(tensor: StateTensor, dtype: torch.dtype) -> StateTensor:
    return tensor.mapped(lambda values: values.to(dtype).to(values.dtype))


def _in_engines(ranges: Ranges, config: MegatronBertConfig, task: Task) -> bool:
    """Whether integer engines run the model: not all have kernels, and nothing is computed in floating point."""
    if not (INTEGER_ACTIVATIONS[config.hidden_act].in_engines and HEADS[task.head.kind].in_engines):
        return False
    by_layer = ranges.settings.get("layer_force_dequant", {})
    return all(kind == "none" for kind in (ranges.settings.get("force_dequant", "none"), *by_layer.values()))


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with some of them changed."""
    found = dict(settings)
    for name, value in changes.items():
        before = found.get(name)
        found[name] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return found


def _settings(state: CanonicalState, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The section ``task`` of a model, with changes, and of the section ``data`` how its files are read."""
    if state.head is None:
        raise UserError(
            f"{state.label} holds a model without the head of a task: fine-tune it (model.from), or give one that is"
        )
    if state.task is None:
        settings = deduced_settings(state, given)
        if launched_rank() == 0:
            print(deduction_note(state, settings), file=sys.stderr)
        return settings, {}
    try:
        return changed_settings(state, state.task["settings"], dict(state.task["columns"]), given)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{state.label}/{TASK_NAME} is damaged ({error}): fine-tune again, or take the file from a copy"
        ) from None


@contextmanager
def _opened(source: Path) -> Iterator[CanonicalState]:
    """A checkpoint; the settings alone of a directory that has an integer plan in place of weights."""
    folder = finished_model(source)
    if (folder / PLAN_NAME).is_file() and not any((folder / name).is_file() for name in WEIGHTS):
        yield settings_alone(folder_tree(folder))
        return
    with open_checkpoint(source) as state:
        yield state


def load_task(
    source: Path,
    data: dict[str, Any] | None = None,
    task: dict[str, Any] | None = None,
    tokenizer: TokenizerSettings | None = None,
) -> SavedTask:
    """Load a fine-tuned model.

    Args:
        source: a checkpoint of any format with the head of a task: what :func:`save_task` or transformers has
            written, a fine-tuning run or a checkpoint of it, several runs of one command, whose best is taken.
        data: settings of the section ``data`` of a run, for files to evaluate on.
        task: settings of the section ``task`` that change what the model was saved for, or what its head says.
        tokenizer: the vocabulary, where the source has none.

    Raises:
        UserError: it is none, or what is given does not fit it.
    """
    wanted = (None, None) if tokenizer is None else (tokenizer.path, tokenizer.lowercase)
    with _opened(source) as state:
        if state.facts.format == "native" and finished_model(source) != Path(state.label) and launched_rank() == 0:
            print(f"{source} holds no finished model: the checkpoint {state.label} is used", file=sys.stderr)
        given = task or {}
        how_to_use, how = _settings(state, given)
        words = find_vocabulary(source, *wanted, run_state=state.run_state, remedy=_NO_VOCABULARY)
        config = state.config
        check_vocabulary(state, words)
        if given:
            validated(how_to_use, TaskSettings, source="the settings of the task")
        settings = validated(_merged(how, data or {}), TaskDataSettings, source="the settings of the data")
        form = input_format(words, roberta=config.like_roberta)
        found = restore_task({"settings": how_to_use}, words, settings, form)
        check_lengths(found.max_length, found.form, config)
        found.any_pairs = state.task is None
        kept = {"vocab_size": config.vocab_size, "pad_token_id": config.pad_token_id}
        model = _model(state, task_config(config, found, **kept), found) if state else None
    return SavedTask(model, found, Path(state.label))
