"""What a fine-tuning run starts from: the encoder's configuration and vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bert.convert.divisions import pad_vocabulary
from megatron_bert.convert.huggingface import WEIGHTS, open_weights
from megatron_bert.convert.json_files import read_json
from megatron_bert.convert.opening import check_words, config_from, copy_whole, source_tree
from megatron_bert.convert.state import VOCABULARY_TENSORS, WORD_EMBEDDINGS
from megatron_bert.data.tokenizers import JSON_NAME, VOCAB_NAME, Tokenizer, load_tokenizer, tokenizer_of_run
from megatron_bert.family.names import MEGATRON_BERT, fuse
from megatron_bert.finetuning.runs import best_run
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.model.configuration import CONFIG_NAME, MegatronBertConfig
from megatron_bert.model.finetuning import BertForTask
from parallel.errors import UserError

#: Folder of a fine-tuning run with the model of its best checkpoint.
MODEL_FOLDER = "model"
#: Most names of classes in a message.
_SHOWN = 12


def find_tokenizer(settings: FinetuneSettings) -> Tokenizer:
    """The vocabulary that is set, lies beside the checkpoint, or in the run that wrote it.

    Raises:
        UserError: there is none, or it is damaged.
    """
    wanted, source = settings.tokenizer, finetuned_directory(settings.model.from_)
    if wanted is not None:
        return load_tokenizer(wanted.path, lowercase=wanted.lowercase)
    place = tokenizer_of_run(source) or (source if source.is_dir() else None)
    if place is not None and _holds_vocabulary(place):
        return load_tokenizer(place)
    raise UserError(f"{source} holds no vocabulary: set tokenizer.path to the one that its model was trained with")


def _holds_vocabulary(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (JSON_NAME, VOCAB_NAME)) or any(directory.glob("*.model"))


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
    words = stage.config.vocab_size
    with ExitStack() as stack:
        tree = source_tree(finetuned_directory(source), stack)
        if not any(name in tree for name in WEIGHTS):
            raise UserError(
                f"{source} holds no fine-tuned model: give a fine-tuning run, or a directory with its model"
            )
        if CONFIG_NAME not in tree:
            raise UserError(f"{source} holds no {CONFIG_NAME}: copy all files of the fine-tuned model")
        described, stored = read_json(tree[CONFIG_NAME]), open_weights(tree)[0]
        order = _class_order(stage, described, source)
        if (table := stored.get(MEGATRON_BERT.theirs(WORD_EMBEDDINGS)[0])) is not None:
            check_words(table.shape[0], words)
        for name, parameter in stage.named_parameters():
            keys = MEGATRON_BERT.theirs(name)
            if any(key not in stored for key in keys):
                raise UserError(f"{source} holds no {keys[0]}: it was not fine-tuned with this kind of head")
            values = fuse([stored[key].load() for key in keys], stage.config.head_dim)
            if name in VOCABULARY_TENSORS:
                values = pad_vocabulary(name, values[:words], max(words, parameter.shape[0]), bias=0.0)
            if values.shape != parameter.shape:
                raise UserError(
                    f"{source} holds {keys[0]} in shape {list(values.shape)}, but the task makes it "
                    f"{list(parameter.shape)}: it was fine-tuned for other classes"
                )
            copy_whole(parameter, values if order is None or not name.startswith("classifier.") else values[order])


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
        raise UserError(f"id2label in {source / CONFIG_NAME} is damaged ({error}): copy the model again") from None
    if sorted(rows) == sorted(wanted) and sorted(rows.values()) == list(range(len(wanted))):
        return torch.tensor([rows[name] for name in wanted])
    if all(name == f"LABEL_{number}" for name, number in rows.items()):
        return None  # names that nobody gave
    raise UserError(
        f"{source} was fine-tuned for the classes {_listed(rows)}, but the task has {_listed(wanted)}: set task.labels "
        "to the names there, in any order"
    )


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")


def encoder_config(settings: FinetuneSettings, tokenizer: Tokenizer) -> MegatronBertConfig:
    """The configuration of the encoder to start from, with the dropout the settings ask for.

    Raises:
        UserError: the checkpoint cannot be read, or its vocabulary is smaller than the tokenizer's.
    """
    config = config_from(finetuned_directory(settings.model.from_))
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} words, but the model in {settings.model.from_} "
            f"{config.vocab_size}: use the vocabulary that the model was trained with"
        )
    chances = settings.model.model_dump(exclude={"from_", "keep_head"}, exclude_none=True)
    return MegatronBertConfig.from_dict(config.to_dict(), **chances)
