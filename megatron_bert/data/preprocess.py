# SPDX-License-Identifier: Apache-2.0
"""From text files to a corpus in Megatron's format.

The parent process reads rows and writes results in order; decoding, sentence splitting and tokenization happen in the
workers, a chunk of rows at a time, so the output is the same for any number of workers.
"""

import os
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from megatron_bert.data.duplicates import DuplicateCount, document_digests
from megatron_bert.data.indexed_format import best_dtype
from megatron_bert.data.indexed_writer import IndexedWriter
from megatron_bert.data.inputs import InputRows, Part
from megatron_bert.data.merging import part_prefix
from megatron_bert.data.rows import OnBadRow, Row, check_on_bad_row, decode_row
from megatron_bert.data.sentences import SplitterName, check_splitter, sentence_splitter
from megatron_bert.data.sidecar import check_tokenizer, remove_sidecar, write_sidecar
from megatron_bert.data.tokenizers import Tokenizer, load_tokenizer
from megatron_bert.ending import shielded_start, worker_of_a_command
from parallel.errors import UserError

__all__ = ["PreprocessReport", "check_tokenizer", "preprocess"]

CHUNK_BYTES = 1 << 18
CHUNK_ROWS = 1024
CHUNKS_AHEAD = 4
"""Chunks in flight for each worker: enough that none waits, few enough to bound the memory."""


@dataclass(frozen=True)
class PreprocessReport:
    """What a run of `preprocess` did.

    Attributes:
        splitter: What split documents into sentences; None if nothing did.
        skipped_empty: Documents left out because they have no text.
        skipped_bad: Rows left out because they could not be decoded.
        duplicates: Documents written whose tokens are those of an earlier one.
    """

    prefix: str
    documents: int
    sentences: int
    tokens: int
    splitter: SplitterName | None
    skipped_empty: int
    skipped_bad: int
    duplicates: int
    seconds: float


class _Job(NamedTuple):
    """What a worker needs to know once."""

    tokenizer_path: str
    lowercase: bool | None
    json_key: str
    splitter: SplitterName | None
    append_eod: bool
    language: str
    on_bad_row: OnBadRow


class _Chunk(NamedTuple):
    """Result of one chunk of rows, see `IndexedWriter.add_documents`."""

    tokens: np.ndarray
    sizes: np.ndarray
    document_sizes: np.ndarray
    digests: np.ndarray
    skipped_empty: int
    skipped_bad: int


def corpus_prefix(output_prefix: str | os.PathLike[str], json_key: str, *, split_sentences: bool) -> str:
    """Prefix of the corpus that `preprocess` writes."""
    return f"{os.fspath(output_prefix)}_{json_key}_{'sentence' if split_sentences else 'document'}"


def preprocess(
    inputs: Sequence[str | os.PathLike[str]],
    tokenizer_path: str | os.PathLike[str],
    output_prefix: str | os.PathLike[str],
    *,
    workers: int = 1,
    json_key: str = "text",
    split_sentences: bool = True,
    append_eod: bool = False,
    language: str = "en",
    splitter: SplitterName | None = None,
    lowercase: bool | None = None,
    on_bad_row: OnBadRow = "error",
    part: Part | None = None,
    progress: bool = True,
) -> PreprocessReport:
    """Tokenize documents into `{output_prefix}_{json_key}_{sentence|document}.{bin,idx}` and a `.json` note.

    Nothing appears under the final names before everything is done; a failed or interrupted run removes its files.

    Args:
        inputs: Files, directories and patterns, see `find_inputs`.
        tokenizer_path: Anything `load_tokenizer` takes.
        output_prefix: Start of the output names; missing directories are created.
        workers: Processes; 1 works in this one.
        json_key: Where a JSON object holds its text, or the column of a table.
        split_sentences: Make a sentence of each sentence, as pretraining on pairs needs; otherwise of each document.
        append_eod: End each document with the separator token.
        language: ISO 639 code for the sentence splitter.
        splitter: What splits sentences, "sentencex" by default; "punkt" splits as NVIDIA's preprocessing does.
        lowercase: As in `load_tokenizer`.
        on_bad_row: "error" stops at an undecodable row naming file and line, "skip" counts it.
        part: Write this part of the corpus alone, under a name of its own (`part_prefix`); `merge_corpora` of all parts
            gives what a run without parts writes, byte for byte.

    Raises:
        UserError: A missing or undecodable input, an unusable tokenizer or setting, or no text at all.
    """
    started = time.perf_counter()
    check_on_bad_row(on_bad_row)
    if not inputs:
        raise UserError("There is nothing to preprocess: give at least one input file.")
    used = checked_splitter(workers, split_sentences, language, splitter)
    rows = InputRows(inputs, json_key, part)
    tokenizer = load_tokenizer(tokenizer_path, lowercase=lowercase)
    job = _Job(os.fspath(tokenizer_path), lowercase, json_key, used, append_eod, language, on_bad_row)
    prefix = corpus_prefix(output_prefix, json_key, split_sentences=split_sentences)
    if part is not None:
        prefix = part_prefix(prefix, part)
    documents = sentences = tokens = skipped_empty = skipped_bad = 0
    duplicates = DuplicateCount()
    # Closed here, and not when the interpreter finds the time: the bar and the workers end before an error is reported.
    with (
        IndexedWriter(prefix, best_dtype(tokenizer.vocab_size)) as writer,
        closing(_chunks(rows, progress)) as chunks,
        closing(_process(chunks, job, tokenizer, workers)) as processed,
    ):
        for chunk in processed:
            writer.add_documents(chunk.tokens, chunk.sizes, chunk.document_sizes)
            duplicates.add(chunk.digests)
            documents += len(chunk.document_sizes)
            sentences += len(chunk.sizes)
            tokens += chunk.tokens.size
            skipped_empty += chunk.skipped_empty
            skipped_bad += chunk.skipped_bad
        if not documents and part is None:  # a part may be empty
            names = ", ".join(reader.path for reader in rows.readers)
            raise UserError(
                f"No text was found in {names}: {skipped_empty} documents are empty, {skipped_bad} unreadable."
            )
        remove_sidecar(prefix)
    how = {"language": language, "sentence_splitter": used, "append_eod": append_eod}
    repeated = duplicates.total()
    counts = {"documents": documents, "sentences": sentences, "tokens": tokens, "duplicate_documents": repeated}
    write_sidecar(prefix, tokenizer, **counts, **how, **({} if part is None else {"part": rows.note()}))
    seconds = time.perf_counter() - started
    return PreprocessReport(prefix, documents, sentences, tokens, used, skipped_empty, skipped_bad, repeated, seconds)


def checked_splitter(
    workers: int, split_sentences: bool, language: str, splitter: SplitterName | None
) -> SplitterName | None:
    """What splits documents into sentences, None for nothing, with the arguments of `preprocess` of these names.

    Raises:
        UserError: They do not go together, or one cannot be.
    """
    if workers < 1:
        raise UserError(f"workers {workers} must be at least 1.")
    if splitter is not None and not split_sentences:
        raise UserError(
            f"Sentence splitter {splitter} has nothing to do where documents are kept whole: leave one out."
        )
    used = (splitter or "sentencex") if split_sentences else None
    if used is not None:
        check_splitter(used, language)
    return used


def _chunks(rows: InputRows, progress: bool) -> Generator[list[Row]]:
    """Group rows; moves the progress bar as the (compressed) input is consumed."""
    chunk: list[Row] = []
    size = 0
    total = rows.bytes_to_read
    with tqdm(total=total, unit="B", unit_scale=True, desc="preprocess", disable=not progress) as bar:
        for row in rows:
            chunk.append(row)
            size += len(row.data)
            if size >= CHUNK_BYTES or len(chunk) >= CHUNK_ROWS:
                yield chunk
                chunk, size = [], 0
                bar.update(rows.bytes_read - bar.n)
        if chunk:
            yield chunk
        bar.update(total - bar.n)


def _process(chunks: Iterator[list[Row]], job: _Job, tokenizer: Tokenizer, workers: int) -> Generator[_Chunk]:
    """Process chunks, here or in workers; results come in the order of the chunks."""
    begun = list(islice(chunks, 2))
    chunks = chain(begun, chunks)
    if workers == 1 or len(begun) == 1:  # one chunk takes less time than the start of a worker
        for rows in chunks:
            yield _tokenize(rows, job, tokenizer)
        return
    # spawn: threads of the calling process (a tokenizer's, torch's) would not survive a fork.
    with shielded_start():  # of multiprocessing's tracker
        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(job,))
    pending: deque[Future[_Chunk]] = deque()
    try:
        for rows in chunks:
            with shielded_start():  # of the workers, at the first chunk
                pending.append(pool.submit(_tokenize_in_worker, rows))
            if len(pending) >= workers * CHUNKS_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"A preprocessing worker ended early: use fewer than {workers} workers if memory ran out; a script of your "
            f"own must call preprocess under `if __name__ == '__main__':`."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker_state: tuple[_Job, Tokenizer]


def _start_worker(job: _Job) -> None:
    global _worker_state
    worker_of_a_command()
    # One process a core is the parallelism; threads of the tokenizers library inside each would compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_state = job, load_tokenizer(job.tokenizer_path, lowercase=job.lowercase)


def _tokenize_in_worker(rows: list[Row]) -> _Chunk:
    return _tokenize(rows, *_worker_state)


def _tokenize(rows: list[Row], job: _Job, tokenizer: Tokenizer) -> _Chunk:
    """Decode, split and tokenize rows; documents and sentences without tokens are left out."""
    texts, skipped_bad = _decode(rows, job)
    if job.splitter is None:
        split = [[text] for text in texts]
    else:
        split = list(map(sentence_splitter(job.splitter, job.language), texts))
    ids = iter(tokenizer.encode_batch([sentence for sentences in split for sentence in sentences]))
    kept: list[list[int]] = []
    document_sizes: list[int] = []
    for sentences in split:
        document = [found for found in (next(ids) for _ in sentences) if found]
        if document:
            if job.append_eod:
                document[-1].append(tokenizer.sep_id)
            kept += document
            document_sizes.append(len(document))
    tokens = np.fromiter(chain.from_iterable(kept), dtype=best_dtype(tokenizer.vocab_size))
    sizes = np.array([len(sentence) for sentence in kept], dtype=np.int32)
    sentences_of = np.array(document_sizes, dtype=np.int64)
    return _Chunk(
        tokens,
        sizes,
        sentences_of,
        document_digests(tokens, sizes, sentences_of),
        len(texts) - len(document_sizes),
        skipped_bad,
    )


def _decode(rows: list[Row], job: _Job) -> tuple[list[str], int]:
    """Texts of rows, and how many rows were skipped."""
    texts = []
    for row in rows:
        try:
            texts.append(decode_row(row, job.json_key))
        except UserError:
            if job.on_bad_row == "error":
                raise
    return texts, len(rows) - len(texts)
