# SPDX-License-Identifier: Apache-2.0
"""Vocabularies beside models, as transformers' tokenizers read them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_bert.data.tokenizer_settings import CONFIG_NAME
from megatron_bert.data.tokenizers import Tokenizer

__all__ = ["AutoTokenizer", "save_tokenizer"]


def save_tokenizer(
    vocabulary: Tokenizer, directory: str | os.PathLike[str], max_length: int | None = None, *, roberta: bool = False
) -> None:
    """Write the vocabulary's files, and what transformers' tokenizers need beside them.

    Args:
        vocabulary: turns text into ids.
        directory: that of the model.
        max_length: tokens of the longest input of the model; None where it is not known.
        roberta: inputs are laid out as RoBERTa's, without token types.
    """
    folder = Path(directory)
    vocabulary.save(folder)
    settings: dict[str, Any] = {
        **vocabulary.transformers_settings(),
        "model_input_names": ["input_ids", *([] if roberta else ["token_type_ids"]), "attention_mask"],
    }
    if max_length is not None:
        settings["model_max_length"] = max_length
    (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
