# SPDX-License-Identifier: Apache-2.0
"""Counting documents that are there more than once."""

import hashlib
from array import array
from itertools import pairwise

import numpy as np


def document_digests(tokens: np.ndarray, sizes: np.ndarray, document_sizes: np.ndarray) -> np.ndarray:
    """A 64-bit hash of the tokens of each document: uint64 [documents].

    Args:
        tokens: [T], ids of all sentences one after the other.
        sizes: int [S], tokens in each sentence.
        document_sizes: int [documents], sentences in each document.
    """
    sentence_ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    bounds = sentence_ends[np.concatenate([[0], np.cumsum(document_sizes)])] * tokens.dtype.itemsize
    content = memoryview(tokens.tobytes())
    digests = b"".join(
        hashlib.blake2b(content[begin:end], digest_size=8).digest() for begin, end in pairwise(bounds.tolist())
    )
    return np.frombuffer(digests, dtype="<u8")


class DuplicateCount:
    """Counts documents that are there before, in 8 bytes for each document."""

    def __init__(self) -> None:
        self._digests = array("Q")

    def add(self, digests: np.ndarray) -> None:
        """Count documents by their hashes, uint64 [documents]."""
        self._digests.frombytes(digests.tobytes())

    def total(self) -> int:
        """How many of the documents equal an earlier one."""
        digests = np.frombuffer(self._digests, dtype=np.uint64)
        digests.sort()
        return int(np.count_nonzero(digests[1:] == digests[:-1]))
