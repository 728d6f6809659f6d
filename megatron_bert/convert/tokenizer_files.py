"""The vocabulary beside converted weights."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_bert.data.tokenizer_settings import CONFIG_NAME
from megatron_bert.data.tokenizers import Tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, for_transformers: bool) -> None:
    """Write a tokenizer's files into a folder; for transformers, with the settings it looks for beside them."""
    tokenizer.save(folder)
    if not for_transformers or not (folder / "tokenizer.json").is_file():
        return
    settings = tokenizer.transformers_settings()
    (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
