# SPDX-License-Identifier: Apache-2.0
"""Held-out scores against a direct computation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_bert.training.trainer import Trainer
from parallel.process_group import process_group
from tests.megatron_bert.training.layouts import Case, make_data, make_trainer


@pytest.mark.parametrize("packed", [False, True])
def test_equals_a_direct_computation(tmp_path: Path, packed: bool) -> None:
    make_data(tmp_path)
    with process_group("cpu"), torch.no_grad():
        trainer: Trainer = make_trainer(Case(packed=packed, microbatches=2), tmp_path)
        scores = trainer.evaluate()
        model, words = trainer.model.stages[0], trainer.config.vocab_size
        masked, labels, pairs, pair_labels = [], [], [], []
        for batch in trainer.objective.held_out_batches(trainer.mesh):
            logits = model(batch)
            masked.append(logits.masked[:, :words].double())
            labels.append(batch.slot_labels)
            pairs.append(logits.pair.double())
            pair_labels.append(batch.pair_labels)
    logits_of_words, wanted = torch.cat(masked), torch.cat(labels)
    right = (logits_of_words.argmax(dim=1) == wanted)[wanted >= 0].double().mean()
    loss = F.cross_entropy(logits_of_words, wanted).item()
    # Sums of some hundred float32 losses: their roundings are below 1e-6 of the sum.
    assert scores["mlm_loss"] == pytest.approx(loss, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert scores["mlm_accuracy"] == pytest.approx(right.item(), abs=1e-12)
    assert scores["sop_loss"] == pytest.approx(
        F.cross_entropy(torch.cat(pairs), torch.cat(pair_labels)).item(), rel=1e-5
    )
    given = torch.cat(pair_labels) >= 0
    expected = (torch.cat(pairs).argmax(dim=1) == torch.cat(pair_labels))[given].double().mean().item()
    assert scores["sop_accuracy"] == pytest.approx(expected, abs=1e-12)
