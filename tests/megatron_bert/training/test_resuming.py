# SPDX-License-Identifier: Apache-2.0
"""Going on with other settings: what is refused, before anything is written, and what is noted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.model.activations import same_activation
from megatron_bert.training.pretrain import pretrain
from parallel.checkpoint import STATE_FILE
from parallel.errors import UserError
from parallel.manifest import write_manifest
from tests.megatron_bert.training.runs import STEPS, rows, run_settings


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    pretrain(run_settings(data, run, model__hidden_act="gelu_new"))
    return run


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"model__num_attention_heads": 4},
            r"num_attention_heads 2, but now num_attention_heads is 4: set it to 2",
        ),
        ({"model__hidden_act": "relu"}, r"with hidden_act gelu_new, but now hidden_act is relu"),
        ({"model__layer_norm_eps": 1e-12}, r"with layer_norm_eps 1e-05, but now layer_norm_eps is 1e-12"),
        ({"model__intermediate_size": 64}, r"with intermediate_size 32, but now intermediate_size is 64"),
        ({"model__num_hidden_layers": 2}, r"with num_hidden_layers 1, but now"),
        ({"model__vocab_size_multiple": 64}, r"padded to a multiple of 24 words, but now .* is 64: set it to 24"),
        ({"training__steps": STEPS - 1}, rf"has trained {STEPS} steps, but the run is to have {STEPS - 1}: raise"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_function_is_refused(data: Path, whole: Path, change: dict[str, Any], expected: str) -> None:
    before = contents(whole)
    with pytest.raises(UserError, match=expected):
        pretrain(run_settings(data, whole, **{"training__steps": 9, "model__hidden_act": "gelu_new"} | change))
    assert contents(whole) == before


def test_another_tokenizer_is_refused_before_anything_is_written(data: Path, whole: Path, tmp_path: Path) -> None:
    """Else the vocabulary in the run directory would no longer be that of the model in it."""
    other = tmp_path / "vocab.txt"
    lines = (data / "vocab.txt").read_text(encoding="utf-8").splitlines()
    other.write_text("\n".join([*lines[:-1], "different"]) + "\n", encoding="utf-8")
    before = contents(whole)
    with pytest.raises(UserError, match="trained with another tokenizer"):
        pretrain(
            run_settings(data, whole, training__steps=9, tokenizer__path=other, model__hidden_act="gelu_new"),
        )
    assert contents(whole) == before


def test_a_damaged_checkpoint_leaves_the_directory_as_it_is(data: Path, whole: Path, tmp_path: Path) -> None:
    """Even what is found only when the tensors are read comes before the first write."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "stopped.json").write_text("{}", encoding="utf-8")
    for path in (run / "checkpoints").rglob("*.distcp"):
        path.write_bytes(b"")
    before = contents(run)
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole \(step_00000006: "):
        pretrain(run_settings(data, run, training__steps=9, model__hidden_act="gelu_new"))
    assert contents(run) == before


def test_another_kind_of_run_is_refused(data: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (path,) = (run / "checkpoints").rglob(STATE_FILE)
    state = json.loads(path.read_text(encoding="utf-8"))
    state["settings"]["task"] = {}
    path.write_text(json.dumps(state), encoding="utf-8")
    write_manifest(path.parent)
    with pytest.raises(UserError, match="was written by `finetune`, and `pretrain` cannot go on from it"):
        pretrain(run_settings(data, run, training__steps=9, model__hidden_act="gelu_new"))


@pytest.mark.usefixtures("pictures")
def test_other_changes_are_noted(data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    changes: dict[str, Any] = {
        "model__hidden_act": "gelu_pytorch_tanh",  # the same function by another name
        "model__hidden_dropout_prob": 0.2,
        "data__pair_objective": "none",
        "data__seq_length": 10,
        "training__seed": 3,
        "training__global_batch_size": 4,
        "learning_rate__peak": 5e-3,
        "training__micro_batch_size": 2,
        "training__recompute": "full",
        "logging__every": 2,
    }
    pretrain(run_settings(data, run, training__steps=STEPS + 2, **changes))
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [
        f"note: {name} is {now}, was {before} up to step {STEPS}"
        for name, now, before in (
            ("learning_rate.peak", 0.005, 0.01),
            ("training.global_batch_size", 4, 8),
            ("training.seed", 3, 1234),
            ("training.steps", STEPS + 2, STEPS),
            ("model.hidden_dropout_prob", 0.2, 0.1),
            ("data.seq_length", 10, 12),
            ("data.pair_objective", "none", "sop"),
        )
    ]
    trained = [row for row in rows(run) if "loss" in row]
    assert "sop_loss" in trained[0]
    assert "sop_loss" not in trained[-1]
    assert (run / "curves.png").stat().st_size > 0, "drawn of the columns that there are"
    with pytest.raises(UserError, match="has no sentence-pair head to go on with"):
        pretrain(run_settings(data, run, training__steps=STEPS + 4, model__hidden_act="gelu_new"))


def test_names_of_one_function() -> None:
    assert same_activation("gelu_new", "gelu_pytorch_tanh")
    assert same_activation("silu", "swish")
    assert not same_activation("gelu", "gelu_new")
    assert not same_activation("relu", "unknown")
