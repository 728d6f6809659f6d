"""A fine-tuned model as a directory: weights and settings that transformers reads, the vocabulary and the task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_bert.config_file import validated
from megatron_bert.data.tokenizers import Tokenizer, load_tokenizer
from megatron_bert.family.tokenizer import AutoTokenizer
from megatron_bert.finetuning.families import ROBERTA, family_of
from megatron_bert.finetuning.runs import best_run
from megatron_bert.finetuning.start import MODEL_FOLDER, family_in
from megatron_bert.ibert import QuantizationConfig, freeze_ranges, named_ranges, quantize_model
from megatron_bert.ibert.family.ranges import RANGES_NAME, load_ranges, save_ranges
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.finetuning import BertForTask
from megatron_bert.tasks.encoding import input_format
from megatron_bert.tasks.registry import restore_task
from megatron_bert.tasks.settings import TaskDataSettings
from megatron_bert.tasks.task import Task
from parallel.checkpoint_reader import load_tensors
from parallel.errors import UserError

#: File that says what the model was fine-tuned for.
TASK_FILE = "task.json"


class SavedTask(NamedTuple):
    """A fine-tuned model, ready to predict.

    Attributes:
        model: with its weights.
        task: with the model's tokenizer.
        directory: it was loaded from.
    """

    model: BertForTask
    task: Task
    directory: Path


def task_config(config: MegatronBertConfig, task: Task, **changes: Any) -> MegatronBertConfig:
    """The configuration of an encoder with a task's tokenizer and classes.

    Args:
        config: of the encoder.
        task: whose head it gets.
        **changes: further fields that replace those of ``config``.
    """
    head, labels = task.head, dict(enumerate(task.labels))
    classes: dict[str, Any] = {"id2label": labels} if labels else {"num_labels": max(head.outputs, 1)}
    fields = changes | classes | {"problem_type": head.problem}
    values = {name: value for name, value in config.to_dict().items() if name not in ("id2label", "label2id")}
    vocabulary = {"vocab_size": task.tokenizer.vocab_size, "pad_token_id": task.tokenizer.pad_id}
    return type(config).from_dict(values, **(vocabulary | fields))


@torch.no_grad()
def save_task(
    checkpoint: Path,
    config: MegatronBertConfig,
    task: Task,
    directory: Path,
    quantization: QuantizationConfig | None = None,
) -> None:
    """Write the model of a checkpoint of a fine-tuning run as a directory; one process, whatever layout trained it.

    Args:
        checkpoint: of the run.
        config: of the model.
        task: it was trained for.
        directory: to write; empty, or not there.
        quantization: how the model is quantised; None for a float model.
    """
    model = family_of(config).classes[task.head.kind](config, initial=False)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if quantization is not None:
        quantize_model(model, quantization, equalise=False)
        freeze_ranges(model)
        tensors |= named_ranges(model)
    load_tensors(checkpoint, {f"model.{model.names.canonical(name)}": tensor for name, tensor in tensors.items()})
    directory.mkdir(parents=True, exist_ok=True)
    if quantization is not None:
        save_ranges(model, directory)
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer(task.tokenizer, config.longest_sequence, roberta=config.like_roberta)
    tokenizer.save_pretrained(directory)
    described = task.describe() | {"columns": _how_to_read(task.data)}
    (directory / TASK_FILE).write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _how_to_read(data: TaskDataSettings) -> dict[str, Any]:
    """The data settings that a file to evaluate on shares with the training file."""
    kept = {"format", "columns", "header", "label_separator", "on_bad_row"}
    return data.model_dump(mode="json", include=kept, exclude_defaults=True)


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with some of them changed."""
    found = dict(settings)
    for name, value in changes.items():
        before = found.get(name)
        found[name] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return found


def _model_directory(source: Path) -> Path:
    """The directory of a fine-tuned model: itself, that of a run, or that of the best of several runs.

    Raises:
        UserError: there is none, or it is not known which run is meant.
    """
    for directory in (source / MODEL_FOLDER, source):
        if (directory / TASK_FILE).is_file():
            return directory
    best = best_run(source)
    if best is not None and (best / MODEL_FOLDER / TASK_FILE).is_file():
        return best / MODEL_FOLDER
    raise UserError(
        f"{source} holds no {TASK_FILE}: give the run directory of a finished `megatron-bert finetune`, or the "
        f"{MODEL_FOLDER} folder in it"
    )


@torch.no_grad()
def load_task(source: Path, data: dict[str, Any] | None = None) -> SavedTask:
    """Load a fine-tuned model.

    Args:
        source: a directory of :func:`save_task`, a fine-tuning run with one, or several runs of one command, whose
            best is taken.
        data: settings of the section ``data`` of a run, for files to evaluate on.

    Raises:
        UserError: it is none.
    """
    directory = _model_directory(source)
    path = directory / TASK_FILE
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        how = dict(described.pop("columns"))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): fine-tune again, or take the file from a copy") from None
    tokenizer: Tokenizer = load_tokenizer(directory)
    settings = validated(_merged(how, data or {}), TaskDataSettings, source="the settings of the data")
    family = family_in(directory)
    task = restore_task(described, tokenizer, settings, input_format(tokenizer, roberta=family is ROBERTA))
    public = family.classes[task.head.kind].from_pretrained(directory, **family.floating)
    model = BertForTask(public.config, task.head.kind, task.head.outputs)
    weights = {public.names.canonical(name): parameter for name, parameter in public.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    if (directory / RANGES_NAME).is_file():
        load_ranges(model, directory)
    return SavedTask(model.eval(), task, directory)
