# SPDX-License-Identifier: Apache-2.0
"""The trainer of pretraining runs, for steps on batches that are made up: without a tokenizer's files and a corpus."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import cast

from megatron_bert.config import Settings
from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.training.pretraining import Pretraining
from megatron_bert.training.trainer import Trainer
from parallel.mesh import ParallelMesh
from parallel.process_group import World


@contextmanager
def our_trainer(settings: Settings, vocabulary: int, world: World) -> Iterator[Trainer]:
    """The trainer of a run on one rank, closed at the end.

    Args:
        settings: of the run.
        vocabulary: how many words there are.
        world: of the one rank.
    """
    tokenizer = cast(Tokenizer, SimpleNamespace(vocab_size=vocabulary, pad_id=0, fingerprint=""))
    mesh = ParallelMesh(settings.layout(1), world.device)
    trainer = Trainer(settings, Pretraining(settings, tokenizer), mesh, world, None)
    yield trainer
    trainer.close()
