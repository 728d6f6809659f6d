# SPDX-License-Identifier: Apache-2.0
"""The training and validation streams of a run's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megatron_bert.config import DataSettings, Settings, WeightedPrefix
from megatron_bert.data.indexed import IndexedDataset
from megatron_bert.data.sampling import BlendedCorpus
from megatron_bert.data.sentence_pairs import PairDataset, split_documents
from megatron_bert.data.sidecar import check_tokenizer
from megatron_bert.data.tokenizers import Tokenizer
from parallel.errors import UserError

Part = Literal["train", "valid"]


def open_corpus(settings: Settings, tokenizer: Tokenizer, part: Part) -> BlendedCorpus:
    """The infinite stream of samples of one part of the data.

    The first process to open a corpus builds its sample index and leaves it in the cache for the others.

    Raises:
        UserError: a file is missing or damaged, made with another tokenizer, or yields no sample.
    """
    data = settings.data
    held_out = part == "valid" and data.valid is not None
    corpora = data.valid if held_out and data.valid is not None else data.train
    # Without validation corpora of their own, parts are cut from the training corpora; with them, training has all.
    whole = held_out or (part == "train" and data.valid is not None)
    datasets = [_open(settings, tokenizer, corpus, part, whole) for corpus in corpora]
    return BlendedCorpus(datasets, [corpus.weight for corpus in corpora], settings.training.seed)


def holds_out(data: DataSettings) -> bool:
    """Whether anything is held out to evaluate on.

    Raises:
        UserError: ``data.split`` is none.
    """
    if data.valid is not None:
        return True
    start, stop = split_documents(data.split, 1 << 40)[1]
    return start < stop


def cache_directory(settings: Settings) -> Path:
    """Where sample indices are kept."""
    return settings.data.cache_dir or settings.training.run_dir / "cache"


def _open(settings: Settings, tokenizer: Tokenizer, corpus: WeightedPrefix, part: Part, whole: bool) -> PairDataset:
    data = settings.data
    check_tokenizer(corpus.prefix, tokenizer)
    indexed = IndexedDataset(corpus.prefix)
    count = len(indexed.document_indices) - 1
    documents = (0, count) if whole else split_documents(data.split, count)[0 if part == "train" else 1]
    if part == "valid" and documents[0] == documents[1]:
        raise UserError(
            f"data.split {data.split} leaves none of the {count} documents of {corpus.prefix} to evaluate on: give "
            "data.valid or another split, or set data.split=1,0,0 to train without held-out scores"
        )
    return PairDataset(
        indexed,
        documents,
        tokenizer,
        seq_length=data.seq_length,
        max_predictions=settings.max_predictions,
        mask_probability=data.mask_probability,
        max_ngram=data.max_ngram,
        whole_word=data.whole_word_masking,
        short_sequence_probability=data.short_sequence_probability,
        objective=data.pair_objective,
        filled=data.packed,
        seed=settings.training.seed,
        cache_directory=cache_directory(settings),
    )
