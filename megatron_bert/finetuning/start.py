"""What a fine-tuning run starts from: the encoder's configuration and vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_bert.convert.json_files import read_json
from megatron_bert.convert.opening import config_from
from megatron_bert.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_of_run
from megatron_bert.data.vocabularies import holds_vocabulary
from megatron_bert.finetuning.families import MEGATRON, MODEL_TYPES, ROBERTA, Family
from megatron_bert.finetuning.runs import best_run
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.model.configuration import CONFIG_NAME, MegatronBertConfig
from megatron_bert.tasks.task import Task
from parallel.errors import UserError, brief
from parallel.stored.file_range import FileRange

#: Folder of a fine-tuning run with the model of its best checkpoint.
MODEL_FOLDER = "model"


def find_tokenizer(settings: FinetuneSettings) -> Tokenizer:
    """The vocabulary that is set, lies beside the checkpoint, or in the run that wrote it.

    Raises:
        UserError: there is none, it is damaged, its ids are not the model's, or the checkpoint is not there.
    """
    wanted, source = settings.tokenizer, finetuned_directory(settings.model.from_)
    if not source.exists():
        raise UserError(f"model.from is {source}, which is not there: give a checkpoint, or a run that wrote one")
    kind = _model_type(source)
    if wanted is not None:
        return load_tokenizer(wanted.path, lowercase=wanted.lowercase, model_type=kind)
    place = tokenizer_of_run(source) or (source if source.is_dir() else None)
    if place is not None and holds_vocabulary(place):
        return load_tokenizer(place, model_type=kind)
    raise UserError(f"{source} holds no vocabulary: set tokenizer.path to the one that its model was trained with")


def finetuned_directory(source: Path) -> Path:
    """The directory of a fine-tuned model's weights: of a fine-tuning run that in it, of several runs that of the best.

    Raises:
        UserError: it is not known which of several runs is meant.
    """
    for directory in (source / MODEL_FOLDER, source):
        if (directory / CONFIG_NAME).is_file():
            return directory
    best = best_run(source)
    return source if best is None else best / MODEL_FOLDER


def _description(source: Path) -> dict[str, Any]:
    """The config.json of a directory in transformers' layout, or of a file in it; {} where there is none."""
    folder = source if source.is_dir() else source.parent
    if source.is_dir() or source.suffix in (".safetensors", ".bin", ".json"):
        path = folder / CONFIG_NAME
        if path.is_file():
            return read_json(FileRange.whole(path))
    return {}


def _model_type(source: Path) -> str:
    return str(_description(source).get("model_type", ""))


def family_in(source: Path) -> Family:
    """The family of the model in a directory: what its config.json says, and Megatron's where there is none."""
    return MODEL_TYPES.get(_model_type(source), MEGATRON)


def encoder_config(settings: FinetuneSettings, tokenizer: Tokenizer) -> MegatronBertConfig:
    """The configuration of the encoder to start from, with the dropout the settings ask for.

    Raises:
        UserError: the checkpoint cannot be read, is of another family, or its vocabulary is not the tokenizer's.
    """
    source = finetuned_directory(settings.model.from_)
    kind = _model_type(source)
    if kind and kind not in MODEL_TYPES:
        raise UserError(f"{source} is a {brief(kind)}: fine-tuning starts from {', '.join(MODEL_TYPES)}")
    config = roberta_config(source, tokenizer) if family_in(source) is ROBERTA else config_from(source)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} words, but the model in {settings.model.from_} "
            f"{config.vocab_size}: use the vocabulary that the model was trained with"
        )
    chances = settings.model.model_dump(exclude={"from_", "keep_head"}, exclude_none=True)
    return type(config).from_dict(config.to_dict(), **chances)


def roberta_config(source: Path, tokenizer: Tokenizer) -> MegatronBertConfig:
    """Of a RoBERTa, an XLM-RoBERTa or an I-BERT in transformers' layout."""
    label = str((source if source.is_dir() else source.parent) / CONFIG_NAME)
    config = ROBERTA.config.from_dict(_description(source), label=label, **ROBERTA.floating)
    if config.pruned_heads:
        raise UserError(f"{label} says that attention heads were pruned: only whole models can be fine-tuned")
    if tokenizer.pad_id != config.pad_token_id:
        raise UserError(
            f"the tokenizer's padding has the id {tokenizer.pad_id}, but that of the model in {source} "
            f"{config.pad_token_id}, from which it counts positions: use the vocabulary that the model was trained with"
        )
    return config


def check_lengths(task: Task, config: MegatronBertConfig) -> None:
    """Refuse sequences of a task that an encoder cannot take.

    Raises:
        UserError: they are too long, or have more segments.
    """
    if task.max_length > config.longest_sequence:
        raise UserError(
            f"task.max_length is {task.max_length}, but the model takes at most {config.longest_sequence} "
            f"tokens: set task.max_length={config.longest_sequence} or less"
        )
    if task.form.types and config.type_vocab_size < 2:
        raise UserError(
            f"the model has {config.type_vocab_size} token type, but tasks tell two segments apart: start from one "
            "with 2"
        )
