# SPDX-License-Identifier: Apache-2.0
"""Reading corpora in Megatron's memory-mapped format; `indexed_format` describes the bytes."""

import hashlib
import os
from pathlib import Path

import numpy as np

from megatron_bert.data.indexed_format import DTYPES, HEADER, MAGIC, VERSION, dtype_code, read_header
from parallel.errors import UserError

BLOCK = 1 << 22
"""Sentences checked at a time: bounds the memory of large files."""


class IndexedDataset:
    """A corpus of sentences grouped into documents, read in place from the disk.

    Opening checks that the two files are complete and agree with each other; it reads the index once and no tokens.

    Args:
        prefix: Path of the pair without `.bin` / `.idx`.

    Attributes:
        tokens_path: The `.bin` file.
        sizes: int32 [S], tokens in each sentence.
        offsets: int64 [S], byte offset of each sentence in the `.bin` file.
        document_indices: int64 [D], first sentence of each document; starts with 0 and ends with S.
        modes: int8 [S] of a multimodal file, otherwise None.

    Raises:
        UserError: A file is missing, truncated, of another format or inconsistent.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self._index_path, self.tokens_path = Path(f"{self.prefix}.idx"), Path(f"{self.prefix}.bin")
        for path in (self._index_path, self.tokens_path):
            if not path.is_file():
                raise UserError(
                    f"{path} does not exist: a corpus is a pair PREFIX.bin and PREFIX.idx, and its prefix is given "
                    f"without the suffix."
                )
        code, sentences, boundaries = read_header(self._index_path)
        self._map_index(sentences, boundaries)
        self._check_sizes_and_offsets_start()
        token_bytes = self.tokens_path.stat().st_size
        self.dtype = self._token_dtype(code, token_bytes)
        self._check_offsets()
        self._check_token_bytes(token_bytes)
        self._check_documents()
        # np.asarray drops the memmap class, whose slices cost three times as much as plain views.
        self._tokens = np.asarray(_map(self.tokens_path, self.dtype, 0, token_bytes // self.dtype.itemsize))

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self.sizes)

    def __getitem__(self, sentence: int) -> np.ndarray:
        """Tokens of one sentence, a read-only view."""
        if not -len(self) <= sentence < len(self):
            raise IndexError(f"sentence {sentence} of {len(self)} in {self.prefix}")
        sentence %= len(self)
        return self.tokens(sentence, sentence + 1)

    def tokens(self, first: int, last: int) -> np.ndarray:
        """Tokens of the sentences `first` to `last - 1`, concatenated: a read-only view, 0 <= first <= last <= S."""
        if first >= last:
            return self._tokens[:0]
        begin = int(self.offsets[first]) // self.dtype.itemsize
        end = int(self.offsets[last - 1]) // self.dtype.itemsize + int(self.sizes[last - 1])
        return self._tokens[begin:end]

    def tokens_at(self, places: np.ndarray) -> np.ndarray:
        """Tokens at places of the whole corpus, of the shape of `places`: a copy."""
        return self._tokens[places]

    def fingerprint(self) -> str:
        """Hash of the header, the sentence sizes and the documents: what sample building depends on (64 hex digits)."""
        counts = len(self), len(self.document_indices)
        digest = hashlib.sha256(HEADER.pack(MAGIC, VERSION, dtype_code(self.dtype), *counts))
        for array in (self.sizes, self.document_indices):
            for begin in range(0, len(array), BLOCK):
                digest.update(np.ascontiguousarray(array[begin : begin + BLOCK]).data)
        return digest.hexdigest()

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[str]]:
        """Data loader processes map the files again instead of receiving their content."""
        return IndexedDataset, (self.prefix,)

    def _map_index(self, sentences: int, boundaries: int) -> None:
        """Map the arrays of the index after checking that the file is exactly as long as its counts say."""
        size = self._index_path.stat().st_size
        expected = HEADER.size + 12 * sentences + 8 * boundaries
        if size not in (expected, expected + sentences):
            raise UserError(
                f"{self._index_path} is {size} bytes long but {sentences} sentences and {boundaries} document "
                f"boundaries (counts at bytes 18 and 26) need {expected}: it is truncated or corrupt, preprocess again."
            )
        self._offsets_start = HEADER.size + 4 * sentences
        self._documents_start = self._offsets_start + 8 * sentences
        path = self._index_path
        self.sizes = np.asarray(_map(path, np.dtype("<i4"), HEADER.size, sentences))
        self.offsets = np.asarray(_map(path, np.dtype("<i8"), self._offsets_start, sentences))
        self.document_indices = np.asarray(_map(path, np.dtype("<i8"), self._documents_start, boundaries))
        self.modes = None
        if size > expected:
            self.modes = np.asarray(_map(path, np.dtype("i1"), self._documents_start + 8 * boundaries, sentences))

    def _check_sizes_and_offsets_start(self) -> None:
        """Refuse negative sizes and a first sentence that is not at byte 0; also counts the tokens."""
        self._token_count = 0
        for begin in range(0, len(self), BLOCK):
            block = self.sizes[begin : begin + BLOCK]
            if block.min() < 0:
                sentence = begin + int(np.argmax(block < 0))
                self._corrupt(HEADER.size + 4 * sentence, f"sentence {sentence} has {self.sizes[sentence]} tokens")
            self._token_count += int(block.sum(dtype=np.int64))
        if len(self) and self.offsets[0] != 0:
            self._corrupt(self._offsets_start, f"sentence 0 starts at byte {self.offsets[0]} instead of 0")

    def _token_dtype(self, code: int, token_bytes: int) -> np.dtype:
        if code not in DTYPES:
            raise UserError(f"{self._index_path} byte 17 gives token type {code}: the format knows 1 to {max(DTYPES)}.")
        # Megatron-LM up to 2.x wrote code 7 for float64; the length of the token file tells.
        if code == 7 and self._token_count and token_bytes == 8 * self._token_count:
            return DTYPES[6]
        return DTYPES[code]

    def _check_offsets(self) -> None:
        """Every sentence must start where the one before it ends."""
        itemsize = self.dtype.itemsize
        for begin in range(0, len(self) - 1, BLOCK):
            end = min(begin + BLOCK, len(self) - 1)
            ends = self.offsets[begin:end] + self.sizes[begin:end].astype(np.int64) * itemsize
            wrong = ends != self.offsets[begin + 1 : end + 1]
            if wrong.any():
                sentence = begin + int(np.argmax(wrong))
                self._corrupt(
                    self._offsets_start + 8 * (sentence + 1),
                    f"sentence {sentence + 1} starts at byte {self.offsets[sentence + 1]} of the tokens but sentence "
                    f"{sentence} ends at byte {ends[sentence - begin]}",
                )

    def _check_token_bytes(self, token_bytes: int) -> None:
        expected = self._token_count * self.dtype.itemsize
        if token_bytes != expected:
            state = f"ends at byte {token_bytes}" if token_bytes < expected else f"has {token_bytes} bytes"
            raise UserError(
                f"{self.tokens_path} {state} but {self._index_path} describes {expected} bytes of {self.dtype} "
                f"tokens: the file is incomplete or belongs to another index, preprocess or copy the pair again."
            )

    def _check_documents(self) -> None:
        documents, start = self.document_indices, self._documents_start
        if len(documents) == 0 or documents[0] != 0:
            self._corrupt(start, "the document boundaries do not start with sentence 0")
        for begin in range(0, len(documents) - 1, BLOCK):
            falling = np.diff(documents[begin : begin + BLOCK + 1]) < 0
            if falling.any():
                document = begin + int(np.argmax(falling)) + 1
                self._corrupt(start + 8 * document, f"document {document} starts before document {document - 1}")
        if documents[-1] != len(self):
            place = start + 8 * (len(documents) - 1)
            self._corrupt(place, f"the last document ends at sentence {documents[-1]} of {len(self)}")

    def _corrupt(self, offset: int, what: str) -> None:
        raise UserError(f"{self._index_path} byte {offset}: {what}; the index is corrupt, preprocess again.")


def _map(path: Path, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    """Map `count` items of a file read-only; an empty range cannot be mapped and needs no file."""
    if count == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))
