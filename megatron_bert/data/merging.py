# SPDX-License-Identifier: Apache-2.0
"""Joining corpora: the parts that several processes made of one text, or corpora of one tokenizer."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bert.data.duplicates import DuplicateCount, document_digests
from megatron_bert.data.indexed import IndexedDataset
from megatron_bert.data.indexed_format import corpus_prefix_of
from megatron_bert.data.indexed_writer import IndexedWriter
from megatron_bert.data.inputs import Part
from megatron_bert.data.sidecar import read_sidecar, remove_sidecar, write_note
from parallel.errors import UserError, first_of

DOCUMENTS = 1 << 13
"""Documents hashed at a time."""

COUNTS = ("documents", "sentences", "tokens", "duplicate_documents")


def part_prefix(prefix: str, part: Part) -> str:
    """Prefix of a part of a corpus; names of all parts sort in their order."""
    return f"{prefix}.part-{part.number:05}-of-{part.count:05}"


@dataclass(frozen=True)
class MergeReport:
    """What `merge_corpora` wrote.

    Attributes:
        duplicates: Documents whose tokens are those of an earlier one.
        noted: Whether the note that names the tokenizer was written; not if one of the corpora has none.
    """

    prefix: str
    corpora: int
    documents: int
    sentences: int
    tokens: int
    duplicates: int
    noted: bool


def merge_corpora(prefixes: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> MergeReport:
    """Join corpora of one tokenizer into one, in the order given; parts of one corpus in their own order.

    All parts give what `preprocess` without parts writes, byte for byte. Nothing has the final names before everything
    is done.

    Args:
        prefixes: Of the corpora, with or without the suffix .idx.
        output: Prefix of the joined corpus; not one of the inputs.

    Raises:
        UserError: No inputs, one that is damaged, corpora of several tokenizers, or parts that do not make a whole.
    """
    if not prefixes:
        raise UserError("There is nothing to merge: give at least one corpus prefix.")
    names = [os.fspath(prefix).removesuffix(".idx") for prefix in prefixes]
    output = corpus_prefix_of(os.fspath(output))
    if Path(output).is_dir():
        raise UserError(f"The merged corpus {output} is a directory: give a prefix, such as {output}/corpus.")
    if any(Path(name).resolve() == Path(output).resolve() for name in names):
        raise UserError(f"The merged corpus {output} cannot replace its own input: choose another prefix.")
    notes = [read_sidecar(name) for name in names]
    _check_tokenizers(names, notes)
    if any(note is not None and "part" in note for note in notes):
        names, notes = _in_order(names, notes)
    corpora = [IndexedDataset(name) for name in names]
    duplicates = DuplicateCount()
    with IndexedWriter(output, corpora[0].dtype) as writer:
        for corpus in corpora:
            writer.add_corpus(corpus)
            for digests in _digests(corpus):
                duplicates.add(digests)
        remove_sidecar(output)
    documents = sum(len(corpus.document_indices) - 1 for corpus in corpora)
    sentences = sum(map(len, corpora))
    tokens = sum(int(corpus.sizes.sum(dtype=np.int64)) for corpus in corpora)
    counts = dict(zip(COUNTS, (documents, sentences, tokens, duplicates.total()), strict=True))
    note = _joined_note(notes, counts)
    if note is not None:
        write_note(output, note)
    return MergeReport(
        output, len(names), documents, sentences, tokens, counts["duplicate_documents"], note is not None
    )


def _digests(corpus: IndexedDataset) -> Iterator[np.ndarray]:
    bounds = corpus.document_indices
    for begin in range(0, len(bounds) - 1, DOCUMENTS):
        sentences = bounds[begin : begin + DOCUMENTS + 1]
        first, last = int(sentences[0]), int(sentences[-1])
        yield document_digests(corpus.tokens(first, last), corpus.sizes[first:last], np.diff(sentences))


def _check_tokenizers(names: list[str], notes: list[dict[str, Any] | None]) -> None:
    known = [(name, note["tokenizer"]) for name, note in zip(names, notes, strict=True) if note is not None]
    for name, fingerprint in known[1:]:
        if fingerprint != known[0][1]:
            raise UserError(
                f"{known[0][0]} and {name} were made with different tokenizers: preprocess one of them again."
            )


def _in_order(names: list[str], notes: list[dict[str, Any] | None]) -> tuple[list[str], list[dict[str, Any] | None]]:
    """Parts of one corpus in their order, checked: all are there, and each begins where the one before it ends."""
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    alike: tuple[str, str] | None = None
    count = 0
    for name, note in zip(names, notes, strict=True):
        if note is None or "part" not in note:
            raise UserError(f"{name} is not a part, but others are parts of a corpus: merge all parts of it first.")
        part = note["part"]
        same = {key: value for key, value in note.items() if key not in (*COUNTS, "part")}
        made = json.dumps([same, part["count"], part["inputs"]])
        if alike is not None and count != part["count"]:
            raise UserError(f"{alike[0]} is one of {count} parts and {name} one of {part['count']}: give those of one.")
        if alike is not None and alike[1] != made:
            raise UserError(
                f"{alike[0]} and {name} are parts of different corpora, or were made with different settings or other "
                f"input files: make the parts again."
            )
        if part["number"] in found:
            raise UserError(f"{found[part['number']][0]} and {name} are the same part: give each once.")
        alike, count = (name, made), part["count"]
        found[part["number"]] = name, note
    missing = [number for number in range(1, count + 1) if number not in found]
    if missing:
        names_missing = first_of((f"{number}/{count}" for number in missing), 8)
        raise UserError(f"Of the {count} parts of the corpus, {names_missing} are not given: make or name them too.")
    ordered = [found[number] for number in sorted(found)]
    for (name, note), (following, next_note) in pairwise(ordered):
        if note["part"]["ends"] != next_note["part"]["begins"]:
            raise UserError(
                f"{following} does not begin where {name} ends: the input has changed, or was decompressed otherwise, "
                f"between them; make both again."
            )
    return [name for name, _ in ordered], [note for _, note in ordered]


def _joined_note(notes: list[dict[str, Any] | None], counts: dict[str, int]) -> dict[str, Any] | None:
    """The note of all: what they share, counts of all, and lists of what differs; None if one has no note."""
    whole = [note for note in notes if note is not None]
    if len(whole) < len(notes):
        return None
    joined: dict[str, Any] = {}
    for key in dict.fromkeys(key for note in whole for key in note if key != "part"):
        if key in counts:
            joined[key] = counts[key]
            continue
        values: list[Any] = []
        for note in whole:
            if note.get(key) not in values:
                values.append(note.get(key))
        joined[key] = values[0] if len(values) == 1 else values
    return joined | {key: value for key, value in counts.items() if key not in joined}
