# SPDX-License-Identifier: Apache-2.0
"""The micro batches of one data rank, loaded ahead of time."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from multiprocessing import forkserver

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_bert.config import Settings
from megatron_bert.data.collate import collate, collate_rows
from megatron_bert.data.corpora import Part, open_corpus
from megatron_bert.data.packing import RowStream
from megatron_bert.data.sampling import BatchShare, BlendedCorpus
from megatron_bert.data.tokenizers import Tokenizer, load_tokenizer
from megatron_bert.ending import SIGNALS, end_with_parent, shielded_start
from megatron_bert.model.batch import MicroBatch


class MicroBatchSource(Dataset[MicroBatch]):
    """Micro batch i of a data rank, counted from the start of training: a pure function of (settings, rank, i).

    :class:`~megatron_bert.data.sampling.BatchShare` says which samples it holds, or which rows where data are packed.
    Every tensor rank of a data rank reads for itself; files are memory-mapped and shared by the ranks of a host.

    Opening is left to the process that reads, so that a source travels to loader processes as settings only.

    Args:
        first_sample: number of the first sample of step 0; a whole number of steps may have been consumed before.
    """

    def __init__(
        self, settings: Settings, part: Part, *, data_rank: int, data_size: int, first_sample: int = 0
    ) -> None:
        self.settings, self.part, self.first_sample = settings, part, first_sample
        self.share = BatchShare(
            global_batch=settings.training.global_batch_size,
            micro_batch=settings.training.micro_batch_size,
            data_rank=data_rank,
            data_size=data_size,
            first_sample=0 if settings.data.packed else first_sample,  # rows are counted from the first
        )
        self._opened: tuple[Tokenizer, BlendedCorpus] | None = None
        self._rows: RowStream | None = None

    def __getstate__(self) -> dict[str, object]:
        """Without what is open."""
        return {**self.__dict__, "_opened": None, "_rows": None}

    def open(self) -> tuple[Tokenizer, BlendedCorpus]:
        """The tokenizer and the corpus, opened once per process."""
        if self._opened is None:
            wanted = self.settings.tokenizer
            tokenizer = load_tokenizer(wanted.path, lowercase=wanted.lowercase)
            self._opened = tokenizer, open_corpus(self.settings, tokenizer, self.part)
        return self._opened

    def open_rows(self) -> RowStream:
        """The rows of packed data, from the first of step 0."""
        if self._rows is None:
            data = self.settings.data
            self._rows = RowStream(
                self.open()[1], length=data.seq_length, most=data.row_samples, first_sample=self.first_sample
            )
        return self._rows

    def __getitem__(self, index: int) -> MicroBatch:
        """Micro batch ``index``."""
        tokenizer, corpus = self.open()
        settings, numbers = self.settings, list(self.share.samples(index))
        if settings.data.packed:
            return self._packed(index, self.open_rows())
        return collate(
            [corpus.sample(number) for number in numbers],
            numbers,
            seq_length=settings.data.seq_length,
            max_predictions=settings.max_predictions,
            pad_id=tokenizer.pad_id,
        )

    def _packed(self, index: int, rows: RowStream) -> MicroBatch:
        corpus, settings, step = rows.corpus, self.settings, index // self.share.micro_batches_per_step
        first, last = (rows.samples_before((step + n) * settings.training.global_batch_size) for n in (0, 1))
        return collate_rows(
            [
                [(number, corpus.sample(number)) for number in rows.row(place).tolist()]
                for place in self.share.samples(index)
            ],
            length=rows.length,
            most=rows.most,
            slots=settings.row_slots(rows.most),
            step_samples=last - first,
        )


def _start_worker(_: int) -> None:
    """Leave signals to the trainer, and end when it does, however it ends.

    A worker that took a signal for its own would end before the trainer has made its last step. torch's workers watch
    the process they are forked from, which in turn lives as long as they do.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def micro_batches(
    source: MicroBatchSource, steps: int, device: torch.device, *, workers: int | None = None
) -> Iterator[MicroBatch]:
    """The micro batches of ``steps`` steps, in order, loaded in the background by ``workers`` processes.

    Args:
        workers: 0 loads in this process; None is ``data.workers`` of the source's settings.
    """
    workers = source.settings.data.workers if workers is None else workers
    if workers:
        # What loader processes are forked from loads their libraries once for all of them.
        forkserver.set_forkserver_preload([__name__])
        with shielded_start():
            forkserver.ensure_running()
    per_step = source.share.micro_batches_per_step
    loader = DataLoader(
        source,
        batch_size=None,
        sampler=range(steps * per_step),
        num_workers=workers,
        prefetch_factor=max(2, -(-2 * per_step // workers)) if workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker if workers else None,
        # A fresh interpreter: a fork would not survive the threads of the training process (collectives, checkpoints).
        multiprocessing_context="forkserver" if workers else None,
    )
    for batch in loader:
        yield batch.to(device)
