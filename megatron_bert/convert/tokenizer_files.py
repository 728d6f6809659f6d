# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of a model, beside its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_bert.convert.run_models import finished_model, settings_file
from megatron_bert.convert.state import CanonicalState
from megatron_bert.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_of_run
from megatron_bert.data.vocabularies import JSON_NAME, SETTINGS_NAME, holds_vocabulary
from megatron_bert.json_file import read_json, section
from parallel.errors import UserError
from parallel.stored.file_range import FileRange
from parallel.whole_files import reporting, write_json


def save_tokenizer(
    vocabulary: Tokenizer, directory: str | os.PathLike[str], max_length: int | None = None, *, roberta: bool = False
) -> None:
    """Write the vocabulary's files, and what transformers' tokenizers need beside them, where they can read them.

    Args:
        max_length: tokens of the longest input of the model; None where it is not known.
        roberta: inputs are laid out as RoBERTa's, without token types.

    Raises:
        UserError: the file system refuses.
    """
    folder = Path(directory)
    settings = vocabulary.transformers_settings()
    settings["model_input_names"] = ["input_ids", *([] if roberta else ["token_type_ids"]), "attention_mask"]
    if max_length is not None:
        settings["model_max_length"] = max_length
    with reporting("written", folder, "make room, or give another directory"):
        vocabulary.save(folder)
        if (folder / JSON_NAME).is_file():
            write_json(folder / SETTINGS_NAME, settings)


def find_vocabulary(
    source: Path,
    given: Path | None = None,
    lowercase: bool | None = None,
    *,
    run_state: dict[str, Any] | None = None,
    remedy: str = "set tokenizer.path to the one that its model was trained with",
) -> Tokenizer:
    """The vocabulary that is given, lies beside a model, or in the run that wrote it.

    Args:
        source: of the model, in any format.
        given: path of a vocabulary that counts more; None where there is none.
        lowercase: whether to lower-case text; None as its files say.
        run_state: what a training checkpoint says of its run, which may name a vocabulary and says its fingerprint.
        remedy: for a message, where there is none.

    Raises:
        UserError: there is none, it is damaged, or its ids are not the model's.
    """
    folder = finished_model(source)
    config = settings_file(folder)
    kind = "" if config is None else str(read_json(FileRange.whole(config)).get("model_type", ""))
    beside = folder if folder.is_dir() and holds_vocabulary(folder) else tokenizer_of_run(folder)
    named, start = (section(run_state, "settings", key) for key in ("tokenizer", "model"))
    place = given or beside
    if place is None and named:
        place, lowercase = Path(str(named.get("path"))), named.get("lowercase")
    if place is not None:
        tokenizer = load_tokenizer(place, lowercase=lowercase, model_type=kind)
    elif start.get("from") is not None:
        place = Path(str(start["from"]))
        tokenizer = find_vocabulary(place, remedy=remedy)
    else:
        raise UserError(f"{source} holds no vocabulary: {remedy}")
    if (run_state or {}).get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(
            f"{source} was trained with another vocabulary than that in {place}: put the tokenizer of the run back "
            "there"
        )
    return tokenizer


def check_vocabulary(source: CanonicalState, tokenizer: Tokenizer) -> None:
    """A model must know the words of a vocabulary, and its padding where it counts positions from that (UserError)."""
    words, padding = source.config.vocab_size, source.config.pad_token_id
    if tokenizer.vocab_size > words:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} words, but the model in {source.label} {words}: use the "
            "vocabulary that the model was trained with"
        )
    if source.config.like_roberta and tokenizer.pad_id != padding:
        raise UserError(
            f"the tokenizer's padding has the id {tokenizer.pad_id}, but that of the model in {source.label} "
            f"{padding}, from which it counts positions: use the vocabulary that the model was trained with"
        )
