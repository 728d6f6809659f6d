# SPDX-License-Identifier: Apache-2.0
"""Micro models of every I-BERT class and batches for them; the rest is as for the MegatronBERT classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import megatron_bert
from megatron_bert import IBertConfig
from parallel.mesh import SINGLE, TensorParallel
from tests.megatron_bert.family import support

#: 91 words in a table of 96; large weights, so that every part of the model matters in its result.
CONFIG = IBertConfig(
    vocab_size=91,
    vocab_size_multiple=32,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=20,
    initializer_range=0.2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
PAD = CONFIG.pad_token_id
HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForTokenClassification",
    "ForQuestionAnswering",
)


def config_of(head: str, **changes: Any) -> IBertConfig:
    """A configuration that suits the class."""
    if "Classification" in head:
        changes.setdefault("num_labels", 5)
    return CONFIG.replaced(**changes)


def build(head: str, config: IBertConfig | None = None, *, tp: TensorParallel = SINGLE, **arguments: Any) -> Any:
    """A model of a class, in evaluation mode, with biases and norms that are not just zeros and ones."""
    torch.manual_seed(3)
    model = getattr(megatron_bert, f"IBert{head}")(config or config_of(head), tp=tp, **arguments)
    return support.noisy(model).eval()


def batch_for(head: str, *, ragged: bool = True) -> dict[str, Tensor]:
    """Inputs of a class; padding is where the mask says, and once where it does not."""
    batch = support.batch_for(head, ragged=ragged)
    mask = batch["attention_mask"].bool()
    ids = torch.where(mask, batch["input_ids"].clamp(min=2), PAD)
    ids[..., 2] = PAD
    return batch | {"input_ids": ids}
