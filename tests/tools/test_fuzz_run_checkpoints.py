# SPDX-License-Identifier: Apache-2.0
"""Mutated checkpoints of runs are what was saved, or refused; the tool itself notices what it looks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import fuzz_run_checkpoints as module


def test_mutations(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    original = module.make_checkpoint(tmp_path / "checkpoints")
    module.load(original)
    outcomes = set()
    for number in range(300):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome, what = module.run_case(original, folder, number)
        assert outcome in ("fine", "refused"), f"case {number}, {what}: {outcome}"
        outcomes.add(outcome)
    assert outcomes == {"fine", "refused"}


@pytest.mark.parametrize("weight", ["model.weight", "optimizer.exp_avg.weight"])
def test_another_value_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    original = module.make_checkpoint(tmp_path / "checkpoints")
    real = module.load_tensors

    def wrong(path: Path, tensors: dict) -> None:
        real(path, tensors)
        if path != original:
            tensors[weight][0, 0] += 1.0

    monkeypatch.setattr(module, "load_tensors", wrong)
    monkeypatch.setattr(module, "break_files", lambda place, chance: "nothing")
    monkeypatch.setattr(module, "inject", lambda place, chance, canary: "nothing")
    monkeypatch.setattr(module, "_rename", lambda place, chance: "nothing")
    (tmp_path / "case").mkdir()
    outcome, _ = next(
        found
        for seed in range(20)
        if "fit" not in (found := module.run_case(original, _fresh(tmp_path, seed), seed))[1]
    )
    assert f"{weight} is another tensor" in outcome


def _fresh(folder: Path, number: int) -> Path:
    place = folder / f"case{number}"
    place.mkdir()
    return place
