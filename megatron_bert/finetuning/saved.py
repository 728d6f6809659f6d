"""A fine-tuned model as a directory: weights and settings that transformers reads, the vocabulary and the task."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_bert.config_file import validated
from megatron_bert.convert.huggingface import WEIGHTS
from megatron_bert.convert.json_files import read_json
from megatron_bert.convert.opening import check_place
from megatron_bert.data.tokenizers import Tokenizer, load_tokenizer
from megatron_bert.family.names import documented_tensors
from megatron_bert.family.tokenizer import save_tokenizer
from megatron_bert.finetuning.deduced import changed_settings, deduced_settings, has_head, told
from megatron_bert.finetuning.families import MEGATRON, ROBERTA, USED_TYPES, family_of
from megatron_bert.finetuning.integer import IntegerTask, integer_task
from megatron_bert.finetuning.runs import best_run
from megatron_bert.finetuning.start import MODEL_FOLDER, check_lengths, roberta_config
from megatron_bert.finetuning.weights import load_finetuned
from megatron_bert.ibert import QuantizationConfig, freeze_ranges, named_ranges, quantize_model
from megatron_bert.ibert.engine.parts import plan_of
from megatron_bert.ibert.engine.plan_file import PLAN_NAME, write_plan
from megatron_bert.ibert.family.ranges import RANGES_NAME, load_ranges, save_ranges
from megatron_bert.model.configuration import CONFIG_NAME, MegatronBertConfig
from megatron_bert.model.finetuning import BertForTask
from megatron_bert.tasks.encoding import input_format
from megatron_bert.tasks.registry import restore_task
from megatron_bert.tasks.settings import TaskDataSettings, TaskSettings
from megatron_bert.tasks.task import Task
from parallel.checkpoint_reader import load_tensors
from parallel.errors import UserError, brief
from parallel.process_group import launched_rank
from parallel.stored.file_range import FileRange

#: File that says what the model was fine-tuned for.
TASK_FILE = "task.json"


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
            threads: of an engine.

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
    computed_in: torch.dtype = torch.float32,
) -> None:
    """Write the model of a checkpoint of a fine-tuning run as a directory; one process, whatever layout trained it.

    Args:
        checkpoint: of the run.
        config: of the model.
        task: it was trained for.
        directory: to write; empty, or not there.
        quantization: how the model is quantised; None for a float model.
        computed_in: number format in which a quantised model saw its parameters, which are rounded to it, so that what
            is saved has the integers that were trained and scored.
    """
    trained = BertForTask(config, task.head.kind, task.head.outputs)
    parameters = {name: parameter.detach() for name, parameter in trained.named_parameters()}
    ranges = {}
    if quantization is not None:
        quantize_model(trained, quantization, equalise=False)
        freeze_ranges(trained)
        ranges = named_ranges(trained)
    load_tensors(checkpoint, {f"model.{name}": tensor for name, tensor in (parameters | ranges).items()})
    if quantization is not None:
        for parameter in parameters.values():
            parameter.copy_(parameter.to(computed_in))
    directory.mkdir(parents=True, exist_ok=True)
    kind = family_of(config).classes[task.head.kind]
    model = kind(kind.config_class.of_encoder(config), initial=False)
    model.load_state_dict(documented_tensors(model.names, parameters, config))
    if quantization is not None:
        save_ranges(trained, directory)
        load_ranges(model, directory)
    model.save_pretrained(directory)
    if quantization is not None and not _in_float(quantization):
        write_plan(plan_of(trained), directory / PLAN_NAME)
    save_tokenizer(task.tokenizer, directory, config.longest_sequence, roberta=config.like_roberta)
    described = task.describe() | {"columns": _how_to_read(task.data)}
    (directory / TASK_FILE).write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _in_float(quantization: QuantizationConfig) -> bool:
    """Whether anything is computed in floating point, which no engine does."""
    return any(kind != "none" for kind in (quantization.force_dequant, *quantization.layer_force_dequant.values()))


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
    if (source / CONFIG_NAME).is_file():
        return source
    check_place(source)
    raise UserError(
        f"{source} holds no {TASK_FILE}: give the run directory of a finished `megatron-bert finetune`, the "
        f"{MODEL_FOLDER} folder in it, or a directory that transformers has saved a fine-tuned model in"
    )


def _of_ours(directory: Path, stated: dict[str, Any], task: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The description of a task that :func:`save_task` wrote, with changes, and how its files are read."""
    path = directory / TASK_FILE
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        settings, how = changed_settings(directory, described["settings"], described.pop("columns"), stated, task)
        return described | {"settings": settings}, how
    except UserError:
        raise
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): fine-tune again, or take the file from a copy") from None


def _config_in(directory: Path, described: dict[str, Any], tokenizer: Tokenizer) -> MegatronBertConfig:
    """The configuration of a fine-tuned model, in floating point."""
    kind = str(described.get("model_type", MEGATRON.config.model_type))
    if kind not in USED_TYPES:
        raise UserError(f"{directory} is a {brief(kind)}: give a model of one of {', '.join(sorted(USED_TYPES))}")
    family = USED_TYPES[kind]
    if family is ROBERTA:
        return roberta_config(directory, tokenizer)
    config = family.config.from_dict(described, label=str(directory / CONFIG_NAME), **family.floating)
    for name in ("pruned_heads", "is_decoder"):
        if getattr(config, name):
            raise UserError(f"{directory / CONFIG_NAME} has {name}: only whole encoders can be used")
    if config.position_embedding_type != "absolute":
        raise UserError(
            f"{directory / CONFIG_NAME} has position_embedding_type {config.position_embedding_type!r}: only absolute "
            "positions can be used"
        )
    return config


@torch.no_grad()
def load_task(source: Path, data: dict[str, Any] | None = None, task: dict[str, Any] | None = None) -> SavedTask:
    """Load a fine-tuned model.

    Args:
        source: a directory of :func:`save_task`, a fine-tuning run with one, several runs of one command, whose best is
            taken, or a directory that transformers has saved a model with the head of a task in.
        data: settings of the section ``data`` of a run, for files to evaluate on.
        task: settings of the section ``task`` that change what the model was saved for, or what its config.json says.

    Raises:
        UserError: it is none, or what is given does not fit it.
    """
    directory, given = _model_directory(source), task or {}
    stated = read_json(FileRange.whole(directory / CONFIG_NAME))
    tokenizer: Tokenizer = load_tokenizer(directory, model_type=str(stated.get("model_type", "")))
    ours = (directory / TASK_FILE).is_file()
    if not ours and not has_head(stated):
        raise UserError(
            f"{directory} holds a model without the head of a task: fine-tune it (model.from), or give one that is"
        )
    config = _config_in(directory, stated, tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} words, but the model {config.vocab_size}: copy "
            "the vocabulary that the model was trained with"
        )
    described, how = _of_ours(directory, stated, given) if ours else ({}, {})
    if not ours:
        described = {"settings": deduced_settings(directory, stated, config, given)}
        if launched_rank() == 0:
            print(told(directory, stated, described["settings"]), file=sys.stderr)
    if given:
        validated(described["settings"], TaskSettings, source="the settings of the task")
    settings = validated(_merged(how, data or {}), TaskDataSettings, source="the settings of the data")
    found = restore_task(described, tokenizer, settings, input_format(tokenizer, roberta=config.like_roberta))
    check_lengths(found, config)
    found.any_pairs = not ours
    kept = {"vocab_size": config.vocab_size, "pad_token_id": config.pad_token_id}
    if (directory / PLAN_NAME).is_file() and not any((directory / name).is_file() for name in WEIGHTS):
        return SavedTask(None, found, directory)
    model = BertForTask(task_config(config, found, **kept), found.head.kind, found.head.outputs)
    load_finetuned(model, directory)
    if (directory / RANGES_NAME).is_file():
        load_ranges(model, directory)
    return SavedTask(model.eval(), found, directory)
