# SPDX-License-Identifier: Apache-2.0
"""What a run says of its data before the first step."""

from __future__ import annotations

from megatron_bert.config import Settings
from megatron_bert.data.packing import RowStream
from megatron_bert.data.sampling import BlendedCorpus
from megatron_bert.data.sentence_pairs import PairDataset

MANY_EPOCHS = 40
"""Passes through its text that BERT was pretrained with (Devlin et al. 2019); more is worth a note."""


def describe_training_data(settings: Settings, corpus: BlendedCorpus, first_step: int) -> list[str]:
    """A line for each training corpus: its size, what is left out and why, the epochs to come; then notes."""
    steps, rows = settings.training.steps, _rows(settings, corpus)
    batch = settings.training.global_batch_size * (rows.samples_per_row() if rows else 1)
    lines, notes = [], []
    past, whole = corpus.epochs(round(first_step * batch)), corpus.epochs(round(steps * batch))
    for dataset, before, after in zip(corpus.datasets, past, whole, strict=True):
        line, note = _describe(dataset)
        done = f" after {before:.1f}" if first_step else ""
        lines.append(
            f"training data {line}; the {steps - first_step:,} steps to come are {after - before:.1f} epochs{done}"
        )
        notes += note
        if after > MANY_EPOCHS:
            notes.append(
                f"note: {steps:,} steps are {after:,.0f} epochs of {dataset.indexed.prefix}, and BERT was pretrained "
                f"with {MANY_EPOCHS}: watch the held-out loss, and take fewer steps or more text if it rises"
            )
    if rows:
        lines.append(
            f"rows of {rows.length} tokens are {rows.fill():.1%} full, with {rows.samples_per_row():.2f} samples on "
            f"average and {rows.most} at most"
        )
    return lines + notes


def describe_held_out_data(settings: Settings, corpus: BlendedCorpus) -> list[str]:
    """A line for each held-out corpus: its size, what is left out and why, how much an evaluation reads; then notes."""
    rows = _rows(settings, corpus)
    samples = settings.training.evaluate_batches * settings.training.global_batch_size
    samples = round(samples * rows.samples_per_row()) if rows else samples
    lines, notes = [], []
    for dataset, share in zip(corpus.datasets, corpus.epochs(samples), strict=True):
        line, note = _describe(dataset)
        lines.append(f"held-out data {line}; an evaluation reads {share * len(dataset):,.0f} samples")
        notes += note
        if share > 1:
            notes.append(
                f"note: the {len(dataset):,} held-out samples of {dataset.indexed.prefix} are fewer than an evaluation "
                f"reads and are repeated, masked elsewhere: hold out more documents, or lower training.evaluate_batches"
            )
    return lines + notes


def _rows(settings: Settings, corpus: BlendedCorpus) -> RowStream | None:
    """The rows of packed data."""
    data = settings.data
    return RowStream(corpus, length=data.seq_length, most=data.row_samples) if data.packed else None


def _describe(dataset: PairDataset) -> tuple[str, list[str]]:
    """The size of one corpus and what is cut off, and a note of what is left out."""
    use, prefix, objective = dataset.use(), dataset.indexed.prefix, dataset.objective
    line = f"{prefix}: {use.documents:,} documents of {use.tokens:,} tokens make {use.samples:,} samples per epoch"
    if use.truncated_tokens:
        line += f" ({use.truncated_tokens / use.tokens:.1%} of the tokens are cut off pairs longer than their sample)"
    if not use.skipped_documents:
        return line, []
    return line, [
        f"note: {use.skipped_documents:,} of the documents of {prefix}, {use.skipped_tokens / use.tokens:.1%} of its "
        f"tokens, are not used: they have one sentence, and data.pair_objective {objective} needs two; "
        f'"none" uses every token'
    ]
