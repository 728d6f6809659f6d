# SPDX-License-Identifier: Apache-2.0
"""Small vocabularies and corpora for the tests of data."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from megatron_bert.data.indexed import IndexedDataset
from megatron_bert.data.indexed_writer import IndexedWriter
from megatron_bert.data.tokenizers import Tokenizer, load_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "cat", "sat", "on", "mat", "dog", "ran", "##s", "##ning", "##ed", ",", ".", "!", "a", "b", "##a", "##b"]


def small_vocabulary(folder: Path, words: list[str] = WORDS) -> Path:
    path = folder / "vocab.txt"
    path.write_text("\n".join(SPECIAL + words) + "\n", encoding="utf-8")
    return path


def end_this_process(_: object) -> None:
    """Stands for the kernel killing a worker."""
    os._exit(1)


def numbered_tokenizer(folder: Path, size: int = 500) -> Tokenizer:
    """A vocabulary of `size` entries in which every third ordinary entry continues a word."""
    words = [f"##c{number}" if number % 3 == 0 else f"w{number}" for number in range(size - len(SPECIAL))]
    return load_tokenizer(small_vocabulary(folder, words))


def write_corpus(prefix: Path, documents: list[list[list[int]]], dtype: str = "u2") -> IndexedDataset:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            for sentence in document:
                writer.add_sentence(np.array(sentence, dtype=np.int64))
            writer.end_document()
    return IndexedDataset(prefix)


def random_corpus(prefix: Path, seed: int, documents: int, vocab_size: int = 500) -> IndexedDataset:
    rng = np.random.default_rng(seed)
    content = [
        [
            rng.integers(len(SPECIAL), vocab_size, size=size).tolist()
            for size in rng.geometric(0.08, rng.integers(1, 25))
        ]
        for _ in range(documents)
    ]
    return write_corpus(prefix, content)
