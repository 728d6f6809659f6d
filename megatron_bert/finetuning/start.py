"""What a fine-tuning run starts from: the encoder's configuration and vocabulary."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from megatron_bert.convert.divisions import pad_vocabulary
from megatron_bert.convert.huggingface import WEIGHTS, open_weights
from megatron_bert.convert.opening import config_from, copy_whole, source_tree
from megatron_bert.convert.state import VOCABULARY_TENSORS
from megatron_bert.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_of_run
from megatron_bert.family.names import MEGATRON_BERT, fuse
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.model.configuration import CONFIG_NAME, MegatronBertConfig
from megatron_bert.model.finetuning import BertForTask
from parallel.errors import UserError

#: Folder of a fine-tuning run with the model of its best checkpoint.
MODEL_FOLDER = "model"


def find_tokenizer(settings: FinetuneSettings) -> Tokenizer:
    """The vocabulary that is set, lies beside the checkpoint, or in the run that wrote it.

    Raises:
        UserError: there is none.
    """
    wanted, source = settings.tokenizer, finetuned_directory(settings.model.from_)
    if wanted is not None:
        return load_tokenizer(wanted.path, lowercase=wanted.lowercase)
    place = tokenizer_of_run(source) or (source if source.is_dir() else None)
    if place is not None:
        try:
            return load_tokenizer(place)
        except UserError:
            pass  # said better below
    raise UserError(f"{source} holds no vocabulary: set tokenizer.path to the one that its model was trained with")


def finetuned_directory(source: Path) -> Path:
    """The directory of a fine-tuned model's weights: of a fine-tuning run that in it."""
    inside = source / MODEL_FOLDER
    return inside if (inside / CONFIG_NAME).is_file() else source


@torch.no_grad()
def load_finetuned(stage: BertForTask, source: Path) -> None:
    """Fill a stage, its head included, from a fine-tuned model in transformers' layout.

    Each rank reads the tensors it has a part of, one at a time, and keeps its part.

    Args:
        stage: its parameters may be DTensors over any mesh.
        source: the model's directory, or the fine-tuning run.

    Raises:
        UserError: it holds no such model, or one for other classes.
    """
    with ExitStack() as stack:
        tree = source_tree(finetuned_directory(source), stack)
        if not any(name in tree for name in WEIGHTS):
            raise UserError(
                f"{source} holds no fine-tuned model: give a fine-tuning run, or a directory with its model"
            )
        stored = open_weights(tree)[0]
        for name, parameter in stage.named_parameters():
            keys = MEGATRON_BERT.theirs(name)
            if any(key not in stored for key in keys):
                raise UserError(f"{source} holds no {keys[0]}: it was not fine-tuned with this kind of head")
            values = fuse([stored[key].load() for key in keys], stage.config.head_dim)
            if name in VOCABULARY_TENSORS:
                values = pad_vocabulary(name, values, parameter.shape[0], bias=0.0)
            if values.shape != parameter.shape:
                raise UserError(
                    f"{source} holds {keys[0]} in shape {list(values.shape)}, but the task makes it "
                    f"{list(parameter.shape)}: it was fine-tuned for other classes"
                )
            copy_whole(parameter, values)


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
