# SPDX-License-Identifier: Apache-2.0
"""Weights that are NaN or infinite: every command that would use them refuses, and names the tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bert.cli import main
from megatron_bert.convert.opening import load_into, open_checkpoint
from megatron_bert.finetuning.finetune import finetune
from megatron_bert.model.pretraining import BertForPretraining
from megatron_bert.training.pretrain import pretrain
from megatron_bert.training.trainer import Trainer
from parallel.errors import UserError
from tests.megatron_bert.finetuning.support import make_run
from tests.megatron_bert.finetuning.support import run_settings as finetune_settings
from tests.megatron_bert.quantizing.support import quantize_settings
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import run_settings


def put(model: Path, part: str, value: float, elements: int | None = None) -> str:
    """Overwrite values of the first tensor whose name holds ``part``; its name."""
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in sorted(tensors) if part in name)
    tensors[name].flatten()[:elements] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, data, and a run that has fine-tuned it."""
    folder = tmp_path_factory.mktemp("finite")
    finetune(make_run(folder, training__steps=1))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "made"))


@pytest.mark.parametrize("part", ["layer.1.output.dense.weight", "classifier.weight"])
@pytest.mark.parametrize("command", ["predict", "evaluate", "quantize"])
def test_a_finetuned_model(folder: Path, capsys: pytest.CaptureFixture[str], command: str, part: str) -> None:
    name = put(folder / "run/model", part, float("nan"), 2)
    (folder / "settings.yaml").write_text(quantize_settings(folder).dump())
    arguments = {
        "predict": [str(folder / "run"), "--input", str(folder / "valid.jsonl")],
        "evaluate": [str(folder / "run"), f"data.valid={folder}/valid.jsonl"],
        "quantize": [str(folder / "settings.yaml")],
    }
    assert main([command, *arguments[command]]) == 2
    out, err = capsys.readouterr()
    assert name in err
    assert "holds 2 of " in err
    assert "values that are NaN or infinite" in err
    assert "probabilities" not in out
    assert not (folder / "quantized").exists()


def test_finetune_from_an_encoder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = put(folder / "encoder", "layer.1.output.dense.weight", float("inf"), 1)
    (folder / "settings.yaml").write_text(finetune_settings(folder, training__run_dir=folder / "new").dump())
    assert main(["finetune", str(folder / "settings.yaml")]) == 2
    err = capsys.readouterr().err
    assert f"{folder}/encoder" in err
    assert name in err
    assert not (folder / "new").exists()


def test_what_pretraining_starts_from(folder: Path) -> None:
    name = put(folder / "encoder", "layer.1.output.dense.weight", float("nan"), 3)
    with (
        open_checkpoint(folder / "encoder") as state,
        pytest.raises(UserError, match=rf"{name} holds 3 of [\d,]+ values that are NaN or infinite"),
    ):
        load_into(BertForPretraining(state.config), state)


def test_fill_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make_data(tmp_path)
    save = Trainer.save

    def spoiled(self: Trainer) -> None:
        with torch.no_grad():
            self.parameters["encoder.final_norm.weight"].fill_(float("nan"))
        save(self)

    monkeypatch.setattr(Trainer, "save", spoiled)
    pretrain(run_settings(tmp_path, tmp_path / "run", training__steps=1, learning_rate__warmup_steps=0))
    assert main(["fill-mask", str(tmp_path / "run"), "a [MASK]"]) == 2
    assert "encoder.final_norm.weight" in capsys.readouterr().err


def test_scores_that_are_not_finite_are_an_error_in_their_row(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(folder / "run/model", "classifier.weight", 3e38)
    given = ["--input", str(folder / "valid.jsonl"), "--output", str(tmp_path / "answers")]
    assert main(["predict", str(folder / "run"), *given]) == 0
    answers = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "answers").open(encoding="utf-8")]
    assert [answer["id"] for answer in answers] == [f"r{number}" for number in range(40)]
    assert all("NaN or infinite" in answer["error"] for answer in answers)
    assert "40 rows have no answer" in capsys.readouterr().err
    assert main(["evaluate", str(folder / "run"), f"data.valid={folder}/valid.jsonl"]) == 2
    assert "the loss on the valid split is" in capsys.readouterr().err
