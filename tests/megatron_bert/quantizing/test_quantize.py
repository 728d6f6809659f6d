# SPDX-License-Identifier: Apache-2.0
"""Whole quantization runs: scores side by side, going on, layouts, what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_bert
from megatron_bert.cli import main
from megatron_bert.finetuning import finetune as finetune_module
from megatron_bert.finetuning.inference import evaluate_files
from megatron_bert.finetuning.results import read_results
from megatron_bert.finetuning.saved import load_task
from megatron_bert.ibert import quantizers
from megatron_bert.quantizing.quantize import quantize
from megatron_bert.quantizing.settings import QuantizeSettings
from megatron_bert.training.trainer import Trainer
from parallel.errors import UserError
from tests.megatron_bert.finetuning.support import join_world
from tests.megatron_bert.quantizing.layouts import KEPT, assert_same_steps, quantize_by_steps
from tests.megatron_bert.quantizing.support import make_model, quantize_settings
from tests.megatron_bert.training.runs import assert_same_checkpoint, rows
from tests.worlds import run_world

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel__tensor": 2},
    "sequence": {"parallel__tensor": 2, "parallel__sequence": True, "training__micro_batch_size": 16},
    "zero_bubble": {"parallel__pipeline": 2, "parallel__schedule": "zero-bubble-v"},
    "sharded": {"parallel__sharding": "full", "training__recompute": "full"},
}
#: What the runs of the layouts have in common.
SHORT = {"optimizer__eps": 1e-3, "quantization__calibration_steps": 2}
SHORT |= {"training__steps": 2, "training__evaluate_every": 2}
TAUGHT = {"distillation__weight": 0.5, "distillation__temperature": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantizing")
    make_model(folder)
    return folder


def run(folder: Path, run_dir: Path, **changes: Any) -> list[dict[str, Any]]:
    quantize(quantize_settings(folder, training__run_dir=run_dir, **changes))
    return rows(run_dir)


@pytest.mark.usefixtures("pictures")
def test_scores_stand_side_by_side_and_the_model_is_saved(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run(folder, tmp_path / "run")
    results, float_results = read_results(tmp_path / "run"), read_results(folder / "run")
    assert results is not None
    assert float_results is not None
    splits = results["splits"]
    assert splits["valid_float"] == pytest.approx(float_results["splits"]["valid"], rel=1e-5)
    assert splits["valid_calibrated"]["accuracy"] > splits["valid_float"]["accuracy"] - 0.1
    assert splits["valid"]["accuracy"] > splits["valid_float"]["accuracy"] - 0.1
    assert splits["valid_calibrated"]["loss"] != splits["valid_float"]["loss"]

    saved = load_task(tmp_path / "run")
    found = [quantizer for _, quantizer in quantizers(saved.model)]
    assert len(found) > 30
    assert all(quantizer.frozen and quantizer.limit() > 0.0 for quantizer in found)
    again = evaluate_files(
        tmp_path / "run", [f"data.valid={folder / 'valid.jsonl'}"], output=None, batch_size=5, device="cpu"
    )
    # Integer logits do not depend on the batch; the loss is a float32 sum of them.
    assert again["valid"]["accuracy"] == splits["valid"]["accuracy"]
    assert again["valid"]["loss"] == pytest.approx(splits["valid"]["loss"], rel=1e-6)

    # The engine's answers are those of torch, byte for byte, and its scores the run's.
    plan = tmp_path / "run" / "model" / "integer_plan.safetensors"
    texts = [json.loads(line) for line in (folder / "valid.jsonl").read_text(encoding="utf-8").splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    answers = {}
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "alone"), "--to", "integer"]) == 0
    for name, source, backend in (
        ("torch", "run", "torch"),
        ("engine", "run", "integer"),
        ("without weights", "alone", "integer"),
        ("compiled now", "run", "reference"),
    ):
        if name == "compiled now":
            plan.unlink()
        arguments = ["predict", str(tmp_path / source), "--input", str(tmp_path / "rows.jsonl"), "--backend", backend]
        assert main([*arguments, "--output", str(tmp_path / "answers.jsonl")]) == 0
        answers[name] = (tmp_path / "answers.jsonl").read_bytes()
    assert len(set(answers.values())) == 1
    assert main(["predict", str(tmp_path / "alone"), "--input", str(tmp_path / "rows.jsonl")]) == 2
    assert main(["evaluate", str(folder / "run"), f"data.valid={folder / 'valid.jsonl'}", "--backend", "integer"]) == 2

    # Nothing drops the quantization without a note.
    for source in ("run", "run/model"):
        for command in (["inspect"], ["convert", str(tmp_path / "converted"), "--to", "huggingface", "--dry-run"]):
            capsys.readouterr()
            assert main([*command[:1], str(tmp_path / source), *command[1:]]) == 0
            assert "quantized model" in capsys.readouterr().out

    report = json.loads((tmp_path / "run" / "quantization_report.json").read_text(encoding="utf-8"))["tensors"]
    assert {row["name"] for row in report} <= {f"{name}" for name, _ in quantizers(saved.model)}
    assert len(report) > 30
    assert all(row["snr"] > 5.0 for row in report)
    text = (tmp_path / "run" / "quantization_report.txt").read_text(encoding="utf-8")
    assert "<- worst" in text
    assert (tmp_path / "run" / "quantization_report.png").stat().st_size > 10_000

    float_model = megatron_bert.MegatronBertForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert float_model(torch.tensor([[2, 7, 3]])).logits.shape == (1, 3), "its weights serve in floating point too"
    assert "is a quantized model, loaded in floating point without its quantization.json" in caplog.text


def test_every_layout_takes_the_steps_of_one_process(folder: Path, tmp_path: Path) -> None:
    reference = tmp_path / "one"
    quantize_by_steps(_short(folder, reference))
    run_world(2, _run_rank, folder, tmp_path, reference, timeout=240)
    assert_same_steps([tmp_path / name for name in LAYOUTS], reference)


def _short(folder: Path, run_dir: Path, **changes: Any) -> QuantizeSettings:
    return quantize_settings(folder, training__run_dir=run_dir, **SHORT, **TAUGHT, **KEPT, **changes)


def _run_rank(folder: Path, out: Path, reference: Path) -> None:
    join_world()
    for name, changes in LAYOUTS.items():
        quantize_by_steps(_short(folder, out / name, **changes), reference)


class KilledError(Exception):
    """Stands for a killed process."""


def test_a_killed_run_goes_on_bit_for_bit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"checkpoint__every": 2, "checkpoint__keep": 0, "training__steps": 4, **TAUGHT}
    expected = run(folder, tmp_path / "whole", **changes)
    original = Trainer.train_step

    def train_step(self: Trainer, *args: Any) -> Any:
        if self.step == 3:
            raise KilledError
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", train_step)
        with pytest.raises(KilledError):
            run(folder, tmp_path / "killed", **changes)
    before = {path: path.read_bytes() for path in (tmp_path / "killed").rglob("*") if path.is_file()}
    for name, value in (
        ("quantization__weight_bits", 7),
        ("quantization__residual_bits", 12),
        ("quantization__observer", "mse"),
        ("quantization__equalization", "gamma"),
        ("quantization__calibration_steps", 4),
        ("model__from", folder / "encoder"),
    ):
        with pytest.raises(UserError, match=rf"{name.replace('__', '.')} is .*, which it cannot change on the way"):
            run(folder, tmp_path / "killed", **changes, **{name: value})
    assert {path: path.read_bytes() for path in (tmp_path / "killed").rglob("*") if path.is_file()} == before
    assert run(folder, tmp_path / "killed", **changes) == expected
    last = Path("checkpoints") / "step_00000004"
    assert_same_checkpoint(tmp_path / "killed" / last, tmp_path / "whole" / last)


def test_calibration_alone(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "run", training__steps=None, training__epochs=0.0, quantization__observer="mse")
    results = read_results(tmp_path / "run")
    assert results is not None
    assert (results["best_step"], results["steps"]) == (0, 0)
    assert results["splits"]["valid"] == pytest.approx(results["splits"]["valid_calibrated"], rel=1e-12)


@pytest.mark.parametrize("equalization", ["gamma", "smooth"])
def test_equalized_models_are_saved_as_they_are(folder: Path, tmp_path: Path, equalization: str) -> None:
    """The float function is the same; what is saved gives the run's scores."""
    run(folder, tmp_path / "run", quantization__equalization=equalization, quantization__weight_bits=7)
    results, float_results = read_results(tmp_path / "run"), read_results(folder / "run")
    assert results is not None
    assert float_results is not None
    assert results["splits"]["valid_float"]["loss"] == pytest.approx(float_results["splits"]["valid"]["loss"], rel=1e-4)
    again = evaluate_files(
        tmp_path / "run", [f"data.valid={folder / 'valid.jsonl'}"], output=None, batch_size=9, device="cpu"
    )
    assert again["valid"]["loss"] == pytest.approx(results["splits"]["valid"]["loss"], rel=1e-6)


def test_bfloat16_master_training(folder: Path, tmp_path: Path) -> None:
    found = run(folder, tmp_path / "run", precision__compute="bfloat16")
    assert [row["step"] for row in found if "loss" in row] == [1, 2, 3, 4, 5, 6]
    results = read_results(tmp_path / "run")
    assert results is not None
    assert results["splits"]["valid"]["accuracy"] > results["splits"]["valid_float"]["accuracy"] - 0.15
    # What is saved has the integers that were scored: those of weights in bfloat16.
    valid = [f"data.valid={folder / 'valid.jsonl'}"]
    again = evaluate_files(tmp_path / "run", valid, output=None, batch_size=5, device="cpu")
    assert again["valid"]["loss"] == pytest.approx(results["splits"]["valid"]["loss"], rel=1e-6)


def test_a_run_of_another_arithmetic_does_not_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        for place in ("quantizing.objective", "convert.ranges"):
            patched.setattr(f"megatron_bert.{place}.VERSION", 1)
        run(folder, tmp_path / "run", training__steps=1)
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(UserError, match="in version 1 of the integer arithmetic, and this is 2"):
        run(folder, tmp_path / "run", training__steps=2)


def test_searching(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = quantize_settings(
        folder,
        training__run_dir=tmp_path,
        training__steps=1,
        training__seeds=[1, 2],
        training__evaluate_every=None,
        search__enabled=True,
        search__learning_rate=[1e-5, 1e-4],
        search__attention_probs_dropout_prob=[0.0],
        search__hidden_dropout_prob=[0.1],
    )
    seen = []
    original = finetune_module.train
    monkeypatch.setattr(finetune_module, "train", lambda *given: (seen.append(given[1]), original(*given))[1])
    quantize(settings)
    pairs = [(s.learning_rate.peak, s.training.seed) for s in seen]
    assert pairs == [(1e-5, 1), (1e-5, 2), (1e-4, 1), (1e-4, 2)]
    assert all((s.model.hidden_dropout_prob, s.model.attention_probs_dropout_prob) == (0.1, 0.0) for s in seen)
    results = read_results(tmp_path)
    assert results is not None
    combinations = {f"rate_{rate}_attention_0_hidden_0.1" for rate in ("1e-05", "0.0001")}
    assert set(results["runs"]) == {f"{name}/seed_{seed}" for name in combinations for seed in (1, 2)}
    medians = {name: results["groups"][name]["valid"]["accuracy"]["median"] for name in combinations}
    best = results["best"]
    assert best["median_of_group"] == max(medians.values()) == medians[best["name"].split("/")[0]]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.compile=true"], "training.compile=false"),
        (["precision.compute=float16"], "float32 or bfloat16"),
        (["quantization.weight_bits=4"], "quantization.weight_bits"),
        (["quantization.observer=median"], "quantization.observer"),
        (["quantization.layer_force_dequant={9: gelu}"], "names layer 9, but the model has layers 0 to 3"),
        (["model.from={folder}/encoder"], "was not fine-tuned with this kind of head"),
        (["model.keep_head=false"], "model.keep_head"),
        (["quantizaton.weight_bits=8"], "did you mean quantization?"),
    ],
)
def test_mistakes(
    folder: Path, tmp_path: Path, overrides: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = quantize_settings(folder, training__run_dir=tmp_path / "run")
    config = tmp_path / "config.yaml"
    config.write_text(settings.dump(), encoding="utf-8")
    assert main(["quantize", str(config), *(text.replace("{folder}", str(folder)) for text in overrides)]) == 2
    assert expected in capsys.readouterr().err
