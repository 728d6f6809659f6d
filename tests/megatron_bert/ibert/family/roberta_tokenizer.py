# SPDX-License-Identifier: Apache-2.0
"""A small vocabulary of RoBERTa's kind."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def write_roberta_tokenizer(folder: Path, texts: Iterable[str], max_length: int = 64, vocab_size: int = 320) -> None:
    """A byte-level BPE vocabulary as RoBERTa's, with its special tokens and ids, and the settings beside it."""
    tokenizer = ByteLevelBPETokenizer(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=SPECIAL[:-1], show_progress=False)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"cls": "<s>", "bos": "<s>", "sep": "</s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    settings |= {f"{role}_token": name for role, name in names.items()}
    settings |= {"model_input_names": ["input_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
