"""What a fine-tuning run starts from: the encoder's configuration and vocabulary."""

from __future__ import annotations

from pathlib import Path

from megatron_bert.config import TokenizerSettings
from megatron_bert.convert.opening import config_from
from megatron_bert.data.tokenizers import Tokenizer, load_tokenizer
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.model.configuration import MegatronBertConfig
from parallel.checkpoint import STATE_FILE, latest_checkpoint, read_state
from parallel.errors import UserError


def find_tokenizer(settings: FinetuneSettings) -> Tokenizer:
    """The vocabulary that is set, lies beside the checkpoint, or is named by the run that wrote it.

    Raises:
        UserError: there is none.
    """
    wanted, source = settings.tokenizer, settings.model.from_
    if wanted is None:
        wanted = _of_run(source)
        if wanted is not None and not wanted.path.exists():
            raise UserError(
                f"the run of {source} was trained with the vocabulary {wanted.path}, which is not there: set "
                "tokenizer.path to where it is now"
            )
    if wanted is not None:
        return load_tokenizer(wanted.path, lowercase=wanted.lowercase)
    if source.is_dir():
        try:
            return load_tokenizer(source)
        except UserError:
            pass  # said better below
    raise UserError(f"{source} holds no vocabulary: set tokenizer.path to the one that its model was trained with")


def _of_run(source: Path) -> TokenizerSettings | None:
    checkpoint = latest_checkpoint(source / "checkpoints") if source.is_dir() else None
    checkpoint = checkpoint or source
    if not (checkpoint / STATE_FILE).is_file():
        return None
    stored = read_state(checkpoint).get("settings", {}).get("tokenizer")
    return TokenizerSettings.model_validate(stored) if stored else None


def encoder_config(settings: FinetuneSettings, tokenizer: Tokenizer) -> MegatronBertConfig:
    """The configuration of the encoder to start from, with the dropout the settings ask for.

    Raises:
        UserError: the checkpoint cannot be read, or its vocabulary is smaller than the tokenizer's.
    """
    config = config_from(settings.model.from_)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} words, but the model in {settings.model.from_} "
            f"{config.vocab_size}: use the vocabulary that the model was trained with"
        )
    chances = settings.model.model_dump(exclude={"from_"}, exclude_none=True)
    return MegatronBertConfig.from_dict(config.to_dict(), **chances)
