"""Sequences of one or two texts with their special tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.tasks.task import Feature

PAIR_SPECIALS = 3
"""Special tokens of a pair: [CLS] first [SEP] second [SEP]."""


def pooled_feature(
    tokenizer: Tokenizer, first: Sequence[int], second: Sequence[int] | None, max_length: int
) -> Feature:
    """A sequence for a head on the first token: [CLS] first [SEP], or [CLS] first [SEP] second [SEP].

    Texts that are too long lose tokens at their ends, the longer one first, as in BERT.
    """
    if second is None:
        return feature(tokenizer, first[: max_length - 2], None, rows=[0])
    kept = kept_lengths(len(first), len(second), max_length - PAIR_SPECIALS)
    return feature(tokenizer, first[: kept[0]], second[: kept[1]], rows=[0])


def kept_lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts fit into `room`, when the longer one gives up tokens first."""
    if first + second <= room:
        return first, second
    kept = min(first, max(room - second, (room + 1) // 2))
    return kept, room - kept


def feature(
    tokenizer: Tokenizer, first: Sequence[int], second: Sequence[int] | None, rows: Sequence[int] | None = None
) -> Feature:
    """A sequence of texts that fit; `rows` are all positions when unset."""
    tokens = [tokenizer.cls_id, *first, tokenizer.sep_id]
    types = np.zeros(len(tokens) if second is None else len(tokens) + len(second) + 1, dtype=np.int8)
    types[len(tokens) :] = 1
    if second is not None:
        tokens += [*second, tokenizer.sep_id]
    places = np.array(range(len(tokens)) if rows is None else rows, dtype=np.int32)
    return Feature(np.array(tokens, dtype=np.int32), types, places)
