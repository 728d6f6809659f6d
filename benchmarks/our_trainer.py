# SPDX-License-Identifier: Apache-2.0
"""The trainer of pretraining runs, and its loss, on batches that are made up: without a tokenizer and a corpus."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from megatron_bert.config import Settings
from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.pretraining import BertForPretraining, loss_sums
from megatron_bert.model.sequences import SequenceLayout
from megatron_bert.training.pretraining import Pretraining
from megatron_bert.training.trainer import Trainer
from parallel.mesh import ParallelMesh
from parallel.process_group import World


def step_settings(
    run_dir: Path,
    model: dict[str, Any],
    length: int,
    micro_batch: int,
    micro_batches: int,
    dtype: str,
    *,
    packed: bool = False,
    **training: Any,
) -> Settings:
    """Settings of a pretraining run on one rank, with further ones of the sections ``model`` and ``training``."""
    return Settings.model_validate(
        {
            "model": {"max_position_embeddings": length, **model},
            "tokenizer": {"path": "unused"},
            "data": {"train": [{"prefix": "unused"}], "seq_length": length, "split": "1,0,0", "packed": packed},
            "parallel": {"data": 1},
            "precision": {"compute": dtype},
            "training": {
                "run_dir": run_dir,
                "steps": 1_000_000,
                "global_batch_size": micro_batch * micro_batches,
                "micro_batch_size": micro_batch,
                **training,
            },
        }
    )


def make_batch(config: MegatronBertConfig, batch: int, length: int, seed: int = 0) -> MicroBatch:
    """Full-length sequences with 15 % of the tokens masked."""
    generator = torch.Generator().manual_seed(seed)
    slots_each = round(0.15 * length)
    positions = torch.stack(
        [torch.randperm(length, generator=generator)[:slots_each].sort().values for _ in range(batch)]
    )
    starts = torch.arange(batch) * length
    return MicroBatch(
        tokens=torch.randint(5, config.vocab_size, (batch * length,), generator=generator),
        positions=torch.arange(length).repeat(batch),
        types=(torch.arange(length) >= length // 2).long().repeat(batch),
        samples=torch.arange(batch).repeat_interleave(length),
        layout=SequenceLayout.rectangle(batch, length),
        slots=(starts[:, None] + positions).flatten(),
        slot_labels=torch.randint(5, config.vocab_size, (batch * slots_each,), generator=generator),
        first_tokens=starts,
        pair_labels=torch.randint(2, (batch,), generator=generator),
        lengths=(length,) * batch,
    )


def mean_loss(model: BertForPretraining, batch: MicroBatch) -> Tensor:
    """Of masked tokens and of pairs together, each a mean."""
    sums = loss_sums(model(batch, 1), batch, model.config.vocab_size)
    return sums.masked / batch.slots.shape[0] + sums.pair / batch.first_tokens.shape[0]


@contextmanager
def our_trainer(settings: Settings, vocabulary: int, world: World) -> Iterator[Trainer]:
    """The trainer of a run on one rank, with a vocabulary of so many words, closed at the end."""
    tokenizer = cast(Tokenizer, SimpleNamespace(vocab_size=vocabulary, pad_id=0, fingerprint=""))
    mesh = ParallelMesh(settings.layout(1), world.device)
    trainer = Trainer(settings, Pretraining(settings, tokenizer), mesh, world, None)
    yield trainer
    trainer.close()
