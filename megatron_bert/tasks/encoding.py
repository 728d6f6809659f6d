# SPDX-License-Identifier: Apache-2.0
"""Sequences of one or two texts with their special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_bert.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Feature:
    """One encoded sequence; narrow integers, for there are millions of tokens.

    Attributes:
        tokens: int32 [n], with the special tokens, without padding.
        types: int8 [n], 0 for the first segment and 1 for the second; all 0 where the format has no types.
        rows: int32 [R], the positions whose logits the head gives. [0] for heads on the pooled first token; the first
            piece of each word for token classification; all n positions for question answering.
    """

    tokens: np.ndarray
    types: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class InputFormat:
    """How a model's inputs are laid out: [CLS] text [SEP], or [CLS] first [SEP] .. second [SEP].

    Attributes:
        separators: [SEP] between the texts of a pair.
        types: whether the second text of a pair has the token type 1.
    """

    separators: int = 1
    types: bool = True

    @property
    def pair_specials(self) -> int:
        """Special tokens of a pair."""
        return 2 + self.separators


BERT = InputFormat()


def input_format(tokenizer: Tokenizer, *, roberta: bool) -> InputFormat:
    """What a model was trained with; RoBERTa's is <s> first </s></s> second </s>, without types.

    Args:
        roberta: whether the model is a RoBERTa, or an I-BERT.
    """
    return InputFormat(tokenizer.pair_separators(roberta=roberta), types=not roberta)


def pooled_feature(
    tokenizer: Tokenizer, form: InputFormat, first: Sequence[int], second: Sequence[int] | None, max_length: int
) -> Feature:
    """A sequence for a head on the first token, of one text or a pair.

    Texts that are too long lose tokens at their ends, the longer one first, as in BERT.
    """
    if second is None:
        return feature(tokenizer, form, first[: max_length - 2], None, rows=[0])
    kept = kept_lengths(len(first), len(second), max_length - form.pair_specials)
    return feature(tokenizer, form, first[: kept[0]], second[: kept[1]], rows=[0])


def kept_lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts fit into `room`, when the longer one gives up tokens first."""
    if first + second <= room:
        return first, second
    kept = min(first, max(room - second, (room + 1) // 2))
    return kept, room - kept


def feature(
    tokenizer: Tokenizer,
    form: InputFormat,
    first: Sequence[int],
    second: Sequence[int] | None,
    rows: Sequence[int] | None = None,
) -> Feature:
    """A sequence of texts that fit; `rows` are all positions when unset."""
    tokens = [tokenizer.cls_id, *first, tokenizer.sep_id]
    if second is not None:
        separators = [tokenizer.sep_id] * (form.separators - 1)
        tokens += [*separators, *second, tokenizer.sep_id]
    types = np.zeros(len(tokens), dtype=np.int8)
    if second is not None and form.types:
        types[len(tokens) - len(second) - 1 :] = 1
    places = np.array(range(len(tokens)) if rows is None else rows, dtype=np.int32)
    return Feature(np.array(tokens, dtype=np.int32), types, places)
