# SPDX-License-Identifier: Apache-2.0
"""Saves that fail: warnings while others follow, errors when none does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_bert.training.saving import FAILED_SAVES, Saving
from megatron_bert.training.selection import Selection
from parallel.checkpoint_writer import NotWrittenError
from parallel.errors import UserError


class Disk:
    """Stands for a writer and for the report: what is saved while the disk is full fails when it is waited for."""

    def __init__(self) -> None:
        self.full, self.pending, self.asynchronous = True, False, True
        self.protected: frozenset[int] = frozenset()
        self.said: list[str] = []

    def write(self) -> None:
        self.pending = True

    def finish(self) -> None:
        pending, self.pending = self.pending, False
        if pending and self.full:
            raise NotWrittenError("the disk is full")

    def saved(self) -> list[Any]:
        return []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def disk() -> Disk:
    return Disk()


def saving(disk: Any) -> Saving:
    return Saving(disk, Selection("accuracy"))


def save(one: Saving, disk: Any, step: int, *, last: bool = False) -> None:
    one.save(step, disk.write, disk, last=last)


def test_training_goes_on_until_too_many_fail_in_a_row(disk: Disk) -> None:
    one = saving(disk)
    for step in range(FAILED_SAVES):
        save(one, disk, step)
    assert len(disk.said) == FAILED_SAVES - 1
    assert disk.said[0].startswith("warning: the disk is full; training goes on")
    with pytest.raises(UserError, match="3 saves in a row have failed"):
        save(one, disk, FAILED_SAVES)


def test_a_save_that_succeeds_starts_the_count_again(disk: Disk) -> None:
    one = saving(disk)
    for step in range(3 * FAILED_SAVES):
        disk.full = step % 2 == 1
        save(one, disk, step)
    assert one.failures < FAILED_SAVES


def test_the_last_save_must_succeed(disk: Disk) -> None:
    one = saving(disk)
    with pytest.raises(NotWrittenError):
        save(one, disk, 1, last=True)


def test_a_score_whose_checkpoint_is_not_there_does_not_count(disk: Disk) -> None:
    one = saving(disk)
    disk.full = False
    assert one.evaluated(1, {"accuracy": 0.5})
    save(one, disk, 1)
    one.settle(disk)  # type: ignore[arg-type]
    disk.full = True
    assert one.evaluated(2, {"accuracy": 0.6})
    save(one, disk, 2)
    one.settle(disk)  # type: ignore[arg-type]
    assert one.selection.best_step == 1
    assert disk.protected == {1}


def test_other_mistakes_are_not_taken_for_a_full_disk(disk: Disk) -> None:
    def taken_over() -> None:
        raise UserError("another process has the directory")

    with pytest.raises(UserError, match="another process"):
        saving(disk).save(1, taken_over, disk, last=False)  # type: ignore[arg-type]
    assert disk.said == []


def test_several_of_the_best_are_kept_and_known_again() -> None:
    losses = {1: 3.0, 2: 2.0, 3: float("nan"), 4: 2.5, 5: 2.0, 6: 4.0, 7: 1.0}
    selection = Selection("loss", keep=2, lower_is_better=True)
    kept = {}
    for step, loss in losses.items():
        saved = selection.update(step, {"loss": loss})
        assert saved == (step in selection.protected)
        kept[step] = set(selection.protected)
        resumed = Selection("loss", keep=2, lower_is_better=True)
        resumed.load_state(json.loads(json.dumps(selection.state())))
        assert (resumed.protected, resumed.best_step) == (selection.protected, selection.best_step)
        selection = resumed
    assert kept == {1: {1}, 2: {1, 2}, 3: {1, 2}, 4: {2, 4}, 5: {2, 5}, 6: {2, 5}, 7: {2, 7}}
    assert selection.best_step == 7


def test_a_state_of_before_several_were_kept() -> None:
    selection = Selection("accuracy", keep=3)
    selection.load_state({"best_step": 4, "best_score": 0.5, "last_step": 6, "waited": 2})
    assert selection.protected == {4}
