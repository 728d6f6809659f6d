# SPDX-License-Identifier: Apache-2.0
"""A fine-tuned RoBERTa of transformers to integers: scores side by side, layouts, what is saved."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import megatron_bert
from megatron_bert.cli import main
from megatron_bert.convert.huggingface_names import IBERT
from megatron_bert.finetuning.batches import collate_instances
from megatron_bert.finetuning.inference import evaluate_files, predict_stream
from megatron_bert.finetuning.results import read_results
from megatron_bert.finetuning.saved import load_task
from megatron_bert.ibert import QuantizationConfig, calibrate, quantize_model, quantizers
from megatron_bert.ibert.family.quantized import canonical_name
from megatron_bert.ibert.modules import Quantized
from megatron_bert.model.task_heads.table import HEADS as HEAD_KINDS
from megatron_bert.quantizing.quantize import quantize
from megatron_bert.quantizing.settings import QuantizeSettings
from megatron_bert.tasks.task import Instance
from tests.megatron_bert.finetuning.roberta_support import make_roberta_run
from tests.megatron_bert.finetuning.support import HEADS, join_world
from tests.megatron_bert.finetuning.test_model import instances_for, roberta
from tests.megatron_bert.quantizing.layouts import KEPT, assert_same_steps, quantize_by_steps
from tests.megatron_bert.quantizing.support import quantize_settings
from tests.worlds import run_world

NAMES = {"id2label": {0: "c", 1: "a", 2: "b"}, "label2id": {"c": 0, "a": 1, "b": 2}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel__tensor": 2},
    "pipeline": {"parallel__pipeline": 2, "training__micro_batch_size": 4, "distillation__weight": 0.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classes of the model are in another order than the task's."""
    folder = tmp_path_factory.mktemp("roberta")
    make_roberta_run(folder, "ForSequenceClassification", **NAMES)
    return folder


def settings_of(folder: Path, run_dir: Path, **changes: Any) -> QuantizeSettings:
    short = {
        "training__steps": 2,
        "training__evaluate_every": 2,
        "optimizer__eps": 1e-3,
        "quantization__calibration_steps": 2,
        "training__run_dir": run_dir,
        "model__from": folder / "encoder",
    }
    return quantize_settings(folder, **(short | changes))


@pytest.fixture(scope="module")
def quantized(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("quantized") / "run"
    quantize_by_steps(settings_of(folder, run_dir, **KEPT))
    return run_dir


def test_scores_stand_side_by_side(folder: Path, quantized: Path) -> None:
    """The float model's are those of transformers' class."""
    results = read_results(quantized)
    assert results is not None
    splits = results["splits"]
    assert splits.keys() == {"valid", "valid_float", "valid_calibrated"}
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "encoder").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "encoder")
    losses = []
    for line in (folder / "valid.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        given = tokenizer(row["text"], truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            losses.append(theirs(**given, labels=torch.tensor([NAMES["label2id"][row["label"]]])).loss.item())
    assert splits["valid_float"]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    for name in ("valid_calibrated", "valid"):
        assert splits[name]["loss"] == pytest.approx(splits["valid_float"]["loss"], abs=0.05)
    assert len({split["loss"] for split in splits.values()}) == 3
    report = json.loads((quantized / "quantization_report.json").read_text(encoding="utf-8"))["tensors"]
    found = {row["name"] for row in report}
    assert {"embeddings.ranges.sum", "classifier.dense.ranges.input", "classifier.out_proj.ranges.input"} <= found
    assert all(row["snr"] > 5.0 for row in report)


def test_the_saved_model_is_an_ibert(folder: Path, quantized: Path) -> None:
    """Its integers are those of the public class, its weights those of transformers' in floating point."""
    model = quantized / "model"
    described = json.loads((model / "config.json").read_text(encoding="utf-8"))
    assert (described["model_type"], described["quant_mode"]) == ("ibert", True)
    assert described["id2label"] == {"0": "a", "1": "b", "2": "c"}
    saved = load_task(quantized)
    assert all(quantizer.frozen and quantizer.limit() > 0.0 for _, quantizer in quantizers(saved.model))
    public = megatron_bert.IBertForSequenceClassification.from_pretrained(model)
    assert isinstance(public.classifier.dense, Quantized)
    row = {"text": "w1 w31 w2 w45"}
    answers = io.StringIO()
    predict_stream(quantized, io.StringIO(json.dumps(row) + "\n"), answers, batch_size=2, device="cpu")
    (instance,) = saved.task.instances([saved.task.example_from(row, "")], train=False)
    ids = torch.from_numpy(instance.features[0].tokens)[None]
    with torch.no_grad():
        logits = public(ids.long()).logits[0]
    chances = dict(zip("abc", logits.softmax(dim=0).tolist(), strict=True))
    assert json.loads(answers.getvalue())["probabilities"] == pytest.approx(chances, abs=1e-6)

    arguments = {"output_loading_info": True, "quant_mode": False}
    theirs, info = transformers.IBertForSequenceClassification.from_pretrained(model, **arguments)
    assert all(IBERT.is_range(name) for name in info["missing_keys"])
    with torch.no_grad():
        expected = theirs.eval()(ids.long()).logits[0]
    floating = megatron_bert.IBertForSequenceClassification.from_pretrained(model, quant_mode=False)
    torch.testing.assert_close(floating(ids.long()).logits[0], expected, rtol=1e-5, atol=1e-5)
    # Eight bits of weights and inputs, in four layers of large random weights.
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=0.1 * float(expected.abs().max()) + 0.05)


def test_evaluate_gives_the_scores_of_the_run(folder: Path, quantized: Path) -> None:
    results = read_results(quantized)
    assert results is not None
    valid = f"data.valid={folder / 'valid.jsonl'}"
    again = evaluate_files(quantized, [valid], output=None, batch_size=5, device="cpu")
    assert again["valid"] == pytest.approx(results["splits"]["valid"], rel=1e-6)


def test_layouts(folder: Path, quantized: Path, tmp_path: Path) -> None:
    run_world(2, _run_rank, folder, quantized, tmp_path, timeout=240)
    assert_same_steps([tmp_path / name for name in LAYOUTS], quantized)


def _run_rank(folder: Path, reference: Path, out: Path) -> None:
    join_world()
    for name, changes in LAYOUTS.items():
        quantize_by_steps(settings_of(folder, out / name, **changes, **KEPT), reference)


@pytest.mark.parametrize("kind", HEADS)
def test_heads_are_quantized_as_in_the_public_classes(kind: str, tmp_path: Path) -> None:
    """The same quantizers under the same names, and from the same ranges the same integers."""
    ours, _ = roberta(kind, tmp_path)
    public = getattr(megatron_bert, f"IBert{HEAD_KINDS[HEADS[kind].kind].class_ending}").from_pretrained(tmp_path)
    instances = instances_for("roberta", kind)
    batch = collate_instances(instances, range(len(instances)), HEADS[kind], most_features=4)
    for model in (ours, public):
        quantize_model(model, QuantizationConfig())
    calibrate(ours, [batch], ours)
    ranges = {name: quantizer.range for name, quantizer in quantizers(ours)}
    theirs = {canonical_name(public, name): quantizer for name, quantizer in quantizers(public)}
    assert theirs.keys() == ranges.keys()
    assert any(name.startswith(f"{ours.head_kind.module}.") for name in ranges)
    for name, quantizer in theirs.items():
        quantizer.range.copy_(ranges[name])
    with torch.no_grad():
        logits = ours(batch)
        for number, instance in enumerate(instances):
            mine = logits[batch.owners == number]
            assert torch.equal(mine, _of_public(public, instance)), number


def _of_public(public: Any, instance: Instance) -> torch.Tensor:
    """Logits of an instance's rows, each sequence alone."""
    found = []
    for feature in instance.features:
        ids = torch.from_numpy(feature.tokens)[None]
        output = public(ids[None] if isinstance(public, megatron_bert.IBertForMultipleChoice) else ids)
        if "start_logits" in output:
            found.append(torch.stack((output.start_logits[0], output.end_logits[0]), dim=1))
        else:
            whole = output.logits.dim() == 2
            found.append(output.logits if whole else output.logits[0, torch.from_numpy(feature.rows)])
    return torch.cat(found)


def test_an_integer_model_is_quantized_anew(folder: Path, quantized: Path, tmp_path: Path) -> None:
    """From its float weights."""
    again = settings_of(
        folder,
        tmp_path / "run",
        model__from=quantized,
        training__steps=None,
        training__epochs=0.0,
        distillation__weight=0.0,
    )
    quantize(again)
    found, before = read_results(tmp_path / "run"), read_results(quantized)
    assert found is not None
    assert before is not None
    assert found["splits"]["valid_float"]["loss"] == pytest.approx(before["splits"]["valid"]["loss"], abs=0.05)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["quantization.equalization=gamma"], "equalization is 'gamma', but the norms of post-layer-norm"),
        (["task.labels=[a,b,c,d]"], "was fine-tuned for the classes c, a, b, but the task has a, b, c, d"),
    ],
)
def test_mistakes(
    folder: Path, tmp_path: Path, overrides: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(settings_of(folder, tmp_path / "run").dump(), encoding="utf-8")
    assert main(["quantize", str(config), *overrides]) == 2
    assert expected in capsys.readouterr().err
