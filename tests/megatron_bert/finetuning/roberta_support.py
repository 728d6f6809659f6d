# SPDX-License-Identifier: Apache-2.0
"""A small RoBERTa that transformers has made, in place of the encoder of ``support``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_bert.data.tokenizers import load_tokenizer
from tests.megatron_bert.finetuning.support import WORDS, write_classes
from tests.megatron_bert.ibert.family.roberta_tokenizer import write_roberta_tokenizer

#: 34 positions, of which padding has one and another stands unused: 32 tokens.
ROBERTA_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 34,
    "type_vocab_size": 1,
    "initializer_range": 0.1,
    "layer_norm_eps": 1e-5,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "pad_token_id": 1,
}


def make_roberta(folder: Path, kind: str = "Model", **changes: Any) -> Path:
    """A directory ``encoder`` of transformers' class, with random weights and a tokenizer.json.

    Args:
        folder: where.
        kind: what stands behind ``Roberta`` in the name of the class.
        **changes: fields of its configuration.
    """
    target = folder / "encoder"
    target.mkdir(parents=True)
    # Every word with the space before it is one token, as in a real vocabulary.
    write_roberta_tokenizer(target, [" ".join(WORDS)] * 3, vocab_size=460)
    torch.manual_seed(5)
    sizes = ROBERTA_SIZES | {"vocab_size": load_tokenizer(target).vocab_size} | changes
    getattr(transformers, f"Roberta{kind}")(transformers.RobertaConfig(**sizes)).save_pretrained(target)
    return target


def make_roberta_run(folder: Path, kind: str = "Model", **changes: Any) -> Path:
    """The directory of :func:`make_roberta`, with training and validation data beside it."""
    write_classes(folder / "train.jsonl", 40, 1)
    write_classes(folder / "valid.jsonl", 20, 2)
    return make_roberta(folder, kind, **changes)
