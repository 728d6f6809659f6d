# SPDX-License-Identifier: Apache-2.0
"""Writing corpora in Megatron's memory-mapped format; `indexed_format` describes the bytes."""

import fcntl
import glob
import os
import shutil
import uuid
from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from megatron_bert.data.indexed import IndexedDataset
from megatron_bert.data.indexed_format import DTYPES, HEADER, MAGIC, VERSION, dtype_code
from parallel.errors import UserError
from parallel.whole_files import reporting

COPY_BYTES = 16 << 20
BLOCK = 1 << 20
"""Sentences whose offsets are computed at a time."""

LOCKED_SECONDS = 10
"""A file is locked within so many seconds after it was made."""


class IndexedWriter:
    """Writes a corpus: tokens go to disk as they come, the index is written at the end.

    Use it as a context manager. The files carry temporary names until the block ends without an exception; otherwise
    they are removed and whatever existed under the prefix stays as it was.

    Args:
        prefix: Path of the pair without `.bin` / `.idx`; missing directories are created.
        dtype: Type of the tokens, see `best_dtype`.

    Raises:
        UserError: The format has no code for `dtype`.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: DTypeLike) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in DTYPES.values():
            names = ", ".join(str(known) for known in DTYPES.values())
            raise UserError(f"Tokens of type {self.dtype} cannot be stored: the format knows {names}.")
        self._sizes = array("i")
        self._documents = array("q", [0])
        token = uuid.uuid4().hex  # hosts may share the directory
        self._temporary = {suffix: Path(f"{self.prefix}{suffix}.{token}.tmp") for suffix in (".bin", ".idx")}
        self._tokens_file: BinaryIO | None = None

    def __enter__(self) -> "IndexedWriter":
        with self._reporting():
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
            self._tokens_file = self._temporary[".bin"].open("wb")
            remove_abandoned(self.prefix, self._tokens_file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._tokens_file is not None
        try:
            if kind is None:
                with self._reporting():
                    self._tokens_file.close()
                    self._write_index()
                    self._publish()
        finally:
            for path in self._temporary.values():
                path.unlink(missing_ok=True)
            with suppress(OSError):  # what a full disk has refused before
                self._tokens_file.close()

    def _reporting(self) -> AbstractContextManager[None]:
        return reporting("written", self.prefix, "give a place with room that you may write to")

    def add_sentence(self, tokens: ArrayLike) -> None:
        """Append one sentence, a sequence of integer ids, to the current document.

        Raises:
            UserError: An id does not fit the token type.
        """
        ids = np.asarray(tokens)
        self._write_tokens(ids)
        self._sizes.append(ids.size)

    def end_document(self) -> None:
        """Close the current document; the next sentence starts another."""
        self._documents.append(len(self._sizes))

    def add_documents(self, tokens: np.ndarray, sizes: np.ndarray, document_sizes: np.ndarray) -> None:
        """Append whole documents at once.

        Args:
            tokens: [T], ids of all sentences one after the other.
            sizes: int [S], tokens in each sentence; they add up to T.
            document_sizes: int [documents], sentences in each document; they add up to S.

        Raises:
            UserError: An id does not fit the token type.
        """
        assert sizes.sum() == tokens.size
        assert document_sizes.sum() == len(sizes)
        self._write_tokens(tokens)
        ends = len(self._sizes) + np.cumsum(document_sizes, dtype=np.int64)
        self._sizes.frombytes(sizes.astype(np.intc).tobytes())
        self._documents.frombytes(ends.tobytes())

    def add_corpus(self, corpus: IndexedDataset) -> None:
        """Append all documents of another corpus.

        Raises:
            UserError: The corpus is multimodal or stores another token type.
        """
        if corpus.dtype != self.dtype:
            raise UserError(
                f"{corpus.tokens_path} stores {corpus.dtype} tokens but {self.prefix} {self.dtype}: "
                f"corpora of different tokenizers cannot be merged."
            )
        if corpus.modes is not None:
            raise UserError(f"{corpus.prefix}.idx carries multimodal modes, which a text corpus cannot hold.")
        assert self._tokens_file is not None
        with self._reporting(), corpus.tokens_path.open("rb") as source:
            shutil.copyfileobj(source, self._tokens_file, COPY_BYTES)
        ends = corpus.document_indices[1:] + len(self._sizes)
        self._sizes.frombytes(np.ascontiguousarray(corpus.sizes).tobytes())
        self._documents.frombytes(ends.tobytes())

    def _write_tokens(self, tokens: np.ndarray) -> None:
        assert self._tokens_file is not None, "IndexedWriter is a context manager"
        if tokens.size and tokens.dtype != self.dtype and self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            low, high = tokens.min(), tokens.max()
            if low < limits.min or high > limits.max:
                raise UserError(
                    f"Token id {low if low < limits.min else high} does not fit the {self.dtype} tokens of "
                    f"{self.prefix}.bin: write it with best_dtype(vocab_size)."
                )
        with self._reporting():
            self._tokens_file.write(tokens.astype(self.dtype, copy=False).tobytes())

    def _write_index(self) -> None:
        sizes = np.frombuffer(self._sizes, dtype=np.intc)
        documents = np.frombuffer(self._documents, dtype=np.int64)
        with self._temporary[".idx"].open("wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, dtype_code(self.dtype), len(sizes), len(documents)))
            file.write(sizes.astype("<i4", copy=False).data)
            for offsets in self._offsets(sizes):
                file.write(offsets.data)
            file.write(documents.astype("<i8", copy=False).data)

    def _offsets(self, sizes: np.ndarray) -> Iterator[np.ndarray]:
        """Byte offsets of the sentences, some at a time."""
        start = 0
        for begin in range(0, len(sizes), BLOCK):
            ends = start + np.cumsum(sizes[begin : begin + BLOCK], dtype="<i8") * self.dtype.itemsize
            yield np.concatenate([np.array([start], dtype="<i8"), ends[:-1]])
            start = int(ends[-1])

    def _publish(self) -> None:
        """Give the files their names, never leaving an index next to tokens that are not its own."""
        index = Path(f"{self.prefix}.idx")
        index.unlink(missing_ok=True)
        self._temporary[".bin"].replace(f"{self.prefix}.bin")
        self._temporary[".idx"].replace(index)


def remove_abandoned(prefix: str, own: BinaryIO) -> None:
    """Remove the unfinished files that a killed writer of the same prefix has left.

    A writer holds a lock on its file while it lives, on any host where the file system has locks; without locks, and
    when in doubt, files stay.

    Args:
        own: The unfinished file of this writer, which is locked.
    """
    with suppress(OSError):
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        now = os.fstat(own.fileno()).st_mtime
        folder, name = os.path.split(prefix)
        for path in Path(folder or ".").glob(f"{glob.escape(name)}.bin.{'[0-9a-f]' * 32}.tmp"):
            with suppress(OSError), path.open("rb") as file:
                if os.path.samefile(path, own.name) or os.fstat(file.fileno()).st_mtime > now - LOCKED_SECONDS:
                    continue
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
