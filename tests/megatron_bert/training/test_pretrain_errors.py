# SPDX-License-Identifier: Apache-2.0
"""Runs that cannot go on say so, and leave no checkpoint of what went wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megatron_bert.training.pretrain import pretrain
from parallel.checkpoint import latest_checkpoint
from parallel.errors import UserError
from tests.megatron_bert.training.runs import STEPS, rows, run_settings


@pytest.mark.skipif(torch.cuda.is_available(), reason="finds a GPU to compute on")
def test_float16_without_a_gpu(data: Path, tmp_path: Path) -> None:
    settings = run_settings(data, tmp_path / "run", precision__compute="float16", training__device="auto")
    with pytest.raises(UserError, match="float16 needs a GPU and this machine has none: choose bfloat16 or float32"):
        pretrain(settings)
    assert not (tmp_path / "run").exists()


def test_no_held_out_documents(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"split 99999,1,0 leaves none of the 60 documents .* set data\.split=1,0,0"):
        pretrain(run_settings(data, tmp_path / "run", data__split="99999,1,0"))
    assert not (tmp_path / "run").exists()


def test_training_without_held_out_documents(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = run_settings(data, tmp_path, data__split="1,0,0", training__evaluate_every=2)
    pretrain(settings)
    assert "note: data.split 1,0,0 leaves nothing to evaluate on" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, STEPS + 1))
    pretrain(settings)
    assert "nothing left to do" in capsys.readouterr().out


def test_a_pattern_that_matches_no_parameter(data: Path, tmp_path: Path) -> None:
    settings = run_settings(data, tmp_path / "run", optimizer__weight_decay_by_name={"*.lookup.weight": 0.0})
    with pytest.raises(
        UserError, match=r"the pattern '\*\.lookup\.weight', which matches no parameter: names are like"
    ):
        pretrain(settings)
    assert not (tmp_path / "run").exists()


def test_no_steps_evaluate_alone(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The scores of a model as it is: those that its training ended with."""
    pretrain(run_settings(data, tmp_path / "trained", training__evaluate_every=STEPS))
    ended = rows(tmp_path / "trained")[-1]
    model = {"model__from": str(tmp_path / "trained")}
    capsys.readouterr()
    pretrain(run_settings(data, tmp_path / "scored", training__steps=0, **model))
    (scores,) = rows(tmp_path / "scored")
    assert scores["step"] == 0
    names = ("valid_mlm_loss", "valid_sop_loss", "valid_mlm_accuracy")
    assert [scores[name] for name in names] == pytest.approx([ended[name] for name in names])
    assert latest_checkpoint(tmp_path / "scored" / "checkpoints") is None
    assert "training data" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"training\.steps is 0, which evaluates alone, but no data are held out"):
        pretrain(run_settings(data, tmp_path / "none", training__steps=0, data__split="1,0,0"))
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match=f"has trained {STEPS} steps, but the run is to have 0"):
        pretrain(run_settings(data, tmp_path / "trained", training__steps=0))


def test_a_missing_tracker_leaves_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"logging\.trackers names wandb, which cannot be imported"):
        pretrain(run_settings(data, tmp_path / "run", logging__trackers=["wandb"]))
    assert not (tmp_path / "run").exists()
