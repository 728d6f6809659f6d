# SPDX-License-Identifier: Apache-2.0
"""Every layout trains the same model: losses, gradient norms, scores and weights equal those of one process.

Dropout is on, of hidden states and of attention. The tolerance of 1e-5 is what float32 leaves: a sum over n terms in
another order differs by about sqrt(n) roundings of 6e-8, n is some hundreds here, and two optimizer steps follow.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron_bert.model.pretraining import BertForPretraining, loss_sums
from megatron_bert.training.metrics import Report
from megatron_bert.training.staged_model import TIED_NAME
from megatron_bert.training.step_report import write_trace
from parallel.pipeline.schedules import build_schedule
from parallel.sharding import initialize
from tests.megatron_bert.training.covering_cases import CASES, features, random_case, triples
from tests.megatron_bert.training.layouts import (
    STEPS,
    Case,
    Outcome,
    joined,
    largest_difference,
    make_data,
    make_trainer,
    note_weights,
    run_case,
    train,
)
from tests.worlds import CPU, Together, run_world

TOLERANCE = 1e-5
LAMB = [
    Case(
        pipeline=2, data=3, schedule="zero-bubble-h1", sharding="optimizer", microbatches=4, optimizer="lamb", depth=3
    ),
    Case(tensor=2, pipeline=2, data=2, sequence=True, sharding="full", microbatches=2, optimizer="lamb", depth=3),
]
BFLOAT16 = [
    Case(
        tensor=2, pipeline=2, data=2, schedule="zero-bubble-h1", sequence=True, sharding="full", microbatches=4, depth=3
    ),
    Case(pipeline=2, schedule="zero-bubble-v", chunks=2, recompute="full", microbatches=4, packed=True),
    Case(tensor=2, pipeline=2, microbatches=3, recompute="selective", depth=3),
    Case(tensor=2, data=3, sharding="optimizer", microbatches=2, depth=3),
]
BFLOAT16 = [replace(case, compute="bfloat16") for case in BFLOAT16]


class Runs:
    """Outcomes of cases, and of the runs of one process that they are compared with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[Case, Outcome] = {}
        cases = [*CASES, *LAMB, *BFLOAT16]
        cases += sorted({case.plain for case in cases}, key=str)
        self.worlds = Together(*(self._call(case) for case in cases), most=8)

    def _call(self, case: Case) -> tuple[Any, ...]:
        return case.ranks, run_case, case, self.folder

    def __call__(self, case: Case) -> Outcome:
        if case not in self.done:
            self.done[case] = joined(self.worlds(*self._call(case)))
        return self.done[case]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("layouts")
    make_data(path)
    return path


@pytest.fixture(scope="module")
def runs(folder) -> Runs:
    return Runs(folder)


def test_the_cases_hold_every_size_and_every_pair_of_options():
    assert {(case.tensor, case.pipeline, case.data) for case in CASES} == set(triples())
    covered = set().union(*(features(case) for case in CASES))
    rng = random.Random(11)
    for triple in triples():
        for _ in range(20):
            missing = features(random_case(rng, *triple)) - covered
            assert not missing


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_to_one_process(runs, case):
    mine, plain = runs(case), runs(case.plain)
    assert mine.initial == plain.initial
    assert largest_difference(mine, plain) < TOLERANCE
    for name, copy in mine.copies.items():
        assert torch.equal(copy, mine.weights[name])
    assert list(mine.copies) == ([TIED_NAME] if case.stages > 1 else [])


def _by_hand(folder: Path) -> tuple[list[list[float]], list[float], dict[str, torch.Tensor]]:
    """The training loop that a reader of the settings would write."""
    trainer = make_trainer(Case(), folder)
    settings, config = trainer.settings, trainer.config
    model = BertForPretraining(config)
    initialize(model, settings.training.seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate.peak,
        eps=settings.optimizer.eps,
    )
    losses, norms = [], []
    for batch in trainer.objective.training_batches(trainer.mesh, 0, STEPS, CPU):
        sums = loss_sums(model(batch, trainer.dropout_seed), batch, config.vocab_size)
        masked, pairs = (batch.slot_labels >= 0).sum(), (batch.pair_labels >= 0).sum()
        loss = sums.masked / masked, sums.pair / pairs
        (loss[0] + loss[1]).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.clip_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append([value.item() for value in loss])
    return losses, norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_one_process_equals_a_loop_written_by_hand(runs, folder):
    plain = runs(Case())
    losses, norms, weights = run_world(1, _by_hand, folder)[0]
    by_hand = Outcome(losses, norms, plain.scores, weights=weights)
    assert largest_difference(plain, by_hand) < TOLERANCE
    assert losses[0] != losses[1]
    assert min(norms) > 0.5  # clipping took part


@pytest.mark.parametrize("case", LAMB, ids=str)
def test_lamb_equals_one_process(runs, case):
    """Ratios are of whole parameters, and the copies of the tied embeddings get the same."""
    mine = runs(case)
    assert largest_difference(mine, runs(case.plain)) < TOLERANCE
    for name, copy in mine.copies.items():
        assert torch.equal(copy, mine.weights[name])


@pytest.mark.parametrize("case", BFLOAT16, ids=str)
def test_bfloat16_stays_close(runs, case):
    mine, plain = runs(case), runs(case.plain)
    assert mine.initial == plain.initial
    # bfloat16 keeps 8 bits; losses are means over hundreds of logits that are each off by a few of their roundings.
    wanted = torch.tensor(plain.losses)
    torch.testing.assert_close(torch.tensor(mine.losses), wanted, rtol=4 * torch.finfo(torch.bfloat16).eps, atol=0)
    for name, copy in mine.copies.items():
        assert torch.equal(copy, mine.weights[name])


def _traced(folder: Path, run_dir: Path) -> None:
    trainer = make_trainer(TRACED, folder, run_dir=run_dir, trace=True)
    train(trainer, 1, Outcome())
    with Report(run_dir, trainer.settings.logging, active=trainer.world.is_first, start=0, steps=1) as report:
        write_trace(trainer, report)


TRACED = Case(pipeline=2, schedule="zero-bubble-h1", microbatches=3)


def test_a_step_is_recorded_as_a_picture_and_a_trace(folder, tmp_path):
    run_world(2, _traced, folder, tmp_path)
    assert (tmp_path / "traces" / "step_00000001.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads((tmp_path / "traces" / "step_00000001.json").read_text())["traceEvents"]
    recorded = {(event["pid"], event["name"]) for event in events if event["ph"] == "X"}
    schedule = build_schedule("zero-bubble-h1", 2, 3)
    assert recorded == {(rank, str(action)) for rank, run in enumerate(schedule.actions) for action in run}


# ---------------------------------------------------------------- resuming

SAME_LAYOUT = [
    Case(
        tensor=2,
        pipeline=2,
        data=2,
        schedule="zero-bubble-h1",
        sequence=True,
        sharding="optimizer",
        microbatches=3,
        depth=3,
    ),
    Case(pipeline=2, schedule="zero-bubble-v", chunks=2, microbatches=4, packed=True),
    Case(pipeline=2, data=2, schedule="interleaved-1f1b", chunks=2, sharding="full", microbatches=4),
    Case(pipeline=2, data=2, sharding="optimizer", microbatches=2, compute="bfloat16", optimizer="lamb", depth=3),
]


def _interrupted(case: Case, folder: Path, run_dir: Path) -> None:
    whole = Outcome()
    trainer = make_trainer(case, folder, run_dir=run_dir / "whole")
    train(trainer, 3, whole)
    note_weights(trainer, whole)

    parts = Outcome()
    first = make_trainer(case, folder, run_dir=run_dir)
    train(first, 1, parts)
    first.save()
    second = make_trainer(case, folder, run_dir / "checkpoints" / "step_00000001", run_dir)
    assert (second.step, second.consumed_samples) == (1, first.consumed_samples)
    train(second, 2, parts)
    note_weights(second, parts)
    assert (parts.losses, parts.norms) == (whole.losses, whole.norms)
    for mine, other in ((parts.weights, whole.weights), (parts.copies, whole.copies)):
        assert mine.keys() == other.keys()
        for name, weight in mine.items():
            assert torch.equal(weight, other[name]), name


@pytest.mark.parametrize("case", SAME_LAYOUT, ids=str)
def test_resumed_on_the_same_layout_bit_for_bit(folder, tmp_path, case):
    run_world(case.ranks, _interrupted, case, folder, tmp_path)


#: A run that changes its layout after every step: each axis grows and shrinks, the last stage's copy of the word
#: embeddings is on another rank than the first's, on the same rank, or not there, and states are divided or whole. It
#: stops in the middle of a window of packed samples each time.
JOURNEY = [
    Case(packed=True),
    Case(pipeline=2, schedule="zero-bubble-v", chunks=2, microbatches=4, packed=True),
    Case(tensor=2, data=2, sequence=True, sharding="full", microbatches=3, packed=True),
    Case(pipeline=3, schedule="zero-bubble-h1", microbatches=6, by_hand=True, packed=True),
    Case(tensor=2, pipeline=2, data=2, sharding="optimizer", microbatches=2, packed=True),
    Case(schedule="zero-bubble-v", chunks=2, microbatches=2, packed=True),
    Case(tensor=3, pipeline=2, schedule="interleaved-1f1b", chunks=2, sequence=True, microbatches=4, packed=True),
    Case(data=3, sharding="full", packed=True),
]


def _leg(case: Case, folder: Path, run_dir: Path, step: int) -> Outcome:
    outcome = Outcome()
    resume_from = run_dir / "checkpoints" / f"step_{step:08d}" if step else None
    trainer = make_trainer(case, folder, resume_from, run_dir)
    train(trainer, 1, outcome)
    trainer.save()
    note_weights(trainer, outcome)
    return outcome


def _uninterrupted(steps: int, folder: Path, run_dir: Path) -> Outcome:
    outcome = Outcome()
    trainer = make_trainer(JOURNEY[0], folder, run_dir=run_dir)
    train(trainer, steps, outcome)
    note_weights(trainer, outcome)
    return outcome


def test_resumed_on_another_layout_at_every_step(folder, tmp_path):
    journey = Outcome()
    for step, case in enumerate(JOURNEY):
        leg = joined(run_world(case.ranks, _leg, case, folder, tmp_path / "journey", step))
        journey.losses += leg.losses
        journey.norms += leg.norms
        journey.weights = leg.weights
        for name, copy in leg.copies.items():
            assert torch.equal(copy, leg.weights[name])
    whole = run_world(1, _uninterrupted, len(JOURNEY), folder, tmp_path / "whole")[0]
    assert largest_difference(journey, whole) < TOLERANCE


def test_the_journey_changes_every_axis_both_ways():
    for axis in ("tensor", "pipeline", "data"):
        steps = [getattr(after, axis) - getattr(before, axis) for before, after in pairwise(JOURNEY)]
        assert min(steps) < 0 < max(steps)
