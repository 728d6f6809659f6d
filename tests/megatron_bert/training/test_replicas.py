# SPDX-License-Identifier: Apache-2.0
"""A rank whose copy of weights or optimizer states was damaged is named, and nothing of it is saved."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bert.training.metrics import Report
from megatron_bert.training.replica_check import check_replicas
from megatron_bert.training.signals import StopRequest
from megatron_bert.training.staged_model import TIED_NAME
from megatron_bert.training.trainer import Trainer
from parallel.checkpoint import whole_checkpoints
from parallel.errors import UserError
from parallel.replicas import bits_hash, sum_hash
from tests.megatron_bert.training.layouts import STEPS, Case, Outcome, make_trainer, train
from tests.worlds import run_world

NORM = "encoder.layers.0.mlp_norm.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("function", [bits_hash, sum_hash])
def test_any_changed_element_changes_the_hash(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    values = torch.randn(7, 9, generator=torch.Generator().manual_seed(3)).mul(10).to(dtype)
    before, kept = function(values), values.clone()
    seen = {before.item()}
    for index in range(values.numel()):
        changed = values.clone()
        element = changed.view(-1)[index]
        element.copy_(~element if dtype == torch.bool else element + 1)
        seen.add(function(changed).item())
    assert len(seen) == values.numel() + 1
    assert torch.equal(values, kept)
    assert function(kept) == before
    assert torch.equal(values, values.flip(0)) or function(values.flip(0)) != before
    assert function(values.t()) == function(values.t().contiguous())


def test_zeros_of_either_sign_and_elements_of_later_chunks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel.replicas._CHUNK", 4)
    values = torch.zeros(12)
    hashes = {sum_hash(values).item()}
    for index in range(12):
        changed = values.clone()
        changed[index] = -0.0
        hashes.add(sum_hash(changed).item())
    assert len(hashes) == 13


def damage(trainer: Trainer, name: str, *, moment: str | None = None, amount: float = 0.5) -> None:
    parameter = {**trainer.copies, **trainer.parameters}[name]
    optimizer = trainer.optimizer
    part = optimizer.weights(parameter) if moment is None else optimizer.moments(parameter)[moment]
    part.values.view(-1)[:8] += amount


Damage = tuple[int, str, str | None]


def found(case: Case, folder: Path, run_dir: Path, damages: list[Damage]) -> list[str]:
    """What is said of each damage, one after the other; the same on every rank."""
    trainer = make_trainer(case, folder, run_dir=run_dir)
    train(trainer, 1, Outcome())
    check_replicas(trainer)
    said = []
    for rank, name, moment in damages:
        if trainer.world.rank == rank:
            damage(trainer, name, moment=moment)
        try:
            check_replicas(trainer)
            said.append("")
        except UserError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize(
    ("case", "damages", "wanted"),
    [
        (
            Case(data=3),
            [(1, NORM, None), (2, TIED_NAME, "exp_avg")],
            [
                r"^rank 1 \(.*\) holds other values than the ranks with copies of model\.encoder.*: damaged in memory",
                r"rank 2 \(.*\) holds .* of optimizer\.exp_avg\.embeddings",
            ],
        ),
        (Case(tensor=3), [(1, NORM, None)], [r"^rank 1 \(.*\) holds other values"]),
        (Case(pipeline=2), [(1, TIED_NAME, None)], [r"^ranks 0 \(.*\), 1 \(.*\) hold different values of model\.emb"]),
        (Case(pipeline=2, schedule="zero-bubble-v", chunks=2), [(0, TIED_NAME, None)], [r"^rank 0 .* two copies"]),
        (Case(data=4, sharding="hybrid"), [(3, NORM, None)], [r"^ranks 1 \(.*\), 3 \("]),
        (Case(data=2, sharding="full"), [(1, NORM, None)], ["^$"]),
    ],
    ids=lambda value: str(value) if isinstance(value, Case) else "",
)
def test_the_rank_is_named(data: Path, tmp_path: Path, case: Case, damages: list[Damage], wanted: list[str]) -> None:
    said = run_world(case.ranks, found, case, data, tmp_path, damages)
    for sentence, pattern in zip(said[0], wanted, strict=True):
        assert re.search(pattern, sentence), sentence
    assert all(other == said[0] for other in said)


def damaged_run(folder: Path, run_dir: Path, every: int | None) -> tuple[str, int]:
    """A run that saves every step, with a rank that is damaged in its second one: how it ends, and in which step."""
    trainer = make_trainer(Case(data=2), folder, run_dir=run_dir)
    checkpoint = trainer.settings.checkpoint.model_copy(update={"every": 1, "compare_replicas_every": every})
    trainer.settings = trainer.settings.model_copy(update={"checkpoint": checkpoint})
    original = trainer.train_step

    def train_step(batches: list[Any]) -> Any:
        sums = original(batches)
        if trainer.step == 2 and trainer.world.rank == 1:
            damage(trainer, NORM)
        return sums

    trainer.train_step = train_step  # type: ignore[method-assign]
    logging = trainer.settings.logging
    with StopRequest(None) as stop, Report(run_dir, logging, active=False, start=0, steps=STEPS) as report:
        try:
            trainer.run(stop, report)
        except UserError as error:
            return str(error), trainer.step
    return "", trainer.step


def test_a_damaged_copy_is_not_saved(data: Path, tmp_path: Path) -> None:
    """Of two ranks, the one that has moved far since the last checkpoint is the damaged one."""
    said = run_world(2, damaged_run, data, tmp_path, None)
    assert said[0] == said[1]
    assert said[0][0].startswith("rank 1 (")
    assert list(whole_checkpoints(tmp_path / "checkpoints")) == [1]
