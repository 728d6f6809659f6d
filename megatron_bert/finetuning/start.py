# SPDX-License-Identifier: Apache-2.0
"""What a fine-tuning run starts from: the encoder's configuration and vocabulary."""

from __future__ import annotations

from megatron_bert.convert.huggingface_names import TRAINED_TYPES
from megatron_bert.convert.opening import open_checkpoint
from megatron_bert.convert.state import CanonicalState
from megatron_bert.convert.tokenizer_files import check_vocabulary, find_vocabulary
from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.tasks.encoding import InputFormat
from parallel.errors import UserError, brief, with_article


def find_tokenizer(settings: FinetuneSettings) -> Tokenizer:
    """The vocabulary that is set, lies beside the checkpoint, or in the run that wrote it.

    Raises:
        UserError: there is none, it is damaged, its ids are not the model's, or the checkpoint is not there.
    """
    wanted, source = settings.tokenizer, settings.model.from_
    if not source.exists():
        raise UserError(f"model.from is {source}, which is not there: give a checkpoint, or a run that wrote one")
    if wanted is None:
        return find_vocabulary(source)
    return find_vocabulary(source, wanted.path, wanted.lowercase)


def encoder_config(
    settings: FinetuneSettings, tokenizer: Tokenizer, source: CanonicalState | None = None
) -> MegatronBertConfig:
    """The configuration of the encoder to start from, with the dropout the settings ask for.

    Args:
        source: ``model.from``, open; None opens it.

    Raises:
        UserError: the checkpoint cannot be read, is of another family, or its vocabulary is not the tokenizer's.
    """
    with open_checkpoint(settings.model.from_ if source is None else source) as state:
        config = state.config
        if config.model_type not in TRAINED_TYPES:
            raise UserError(
                f"{state.label} is {with_article(brief(config.model_type))}: fine-tuning starts from "
                f"{', '.join(TRAINED_TYPES)}"
            )
        check_vocabulary(state, tokenizer)
    return settings.model.changed(config)


def check_lengths(max_length: int, form: InputFormat, config: MegatronBertConfig) -> None:
    """Refuse sequences of a task that an encoder cannot take.

    Raises:
        UserError: they are too long, or have more segments.
    """
    if max_length > config.longest_sequence:
        raise UserError(
            f"task.max_length is {max_length}, but the model takes at most {config.longest_sequence} "
            f"tokens: set task.max_length={config.longest_sequence} or less"
        )
    if form.types and config.type_vocab_size < 2:
        raise UserError(
            f"the model has {config.type_vocab_size} token type, but tasks tell two segments apart: start from one "
            "with 2"
        )
