# SPDX-License-Identifier: Apache-2.0
"""`megatron-bert export`: plans that run alone, and graphs that onnxruntime runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from megatron_bert.cli import main
from megatron_bert.exporting.onnx_check import compare_with_integers
from megatron_bert.exporting.onnx_graph import write_onnx
from megatron_bert.ibert import IntegerModel
from megatron_bert.ibert.engine.parts import plan_of
from megatron_bert.ibert.family.ranges import save_ranges
from tests.megatron_bert.ibert.test_integer_model import CLASSES, quantized


@pytest.mark.parametrize("name", CLASSES)
def test_graphs_of_all_classes(name: str, tmp_path: Path) -> None:
    """They run in onnxruntime, near the integers; 7 bits are 7 bits there too."""
    settings = {"attention_bits": 7, "activation_bits": 7} if "MaskedLM" in name else {}
    model, given, expected = quantized(name, **settings)
    path = tmp_path / "model.onnx"
    write_onnx(model, path)
    graph = onnx.load(path)
    kinds = {node.op_type for node in graph.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    # Matrices and words in 8 bits; what is in float32 is small.
    large = [tensor for tensor in graph.graph.initializer if np.prod(tensor.dims) > 40 * 32]
    assert large
    assert {tensor.data_type for tensor in large} == {onnx.TensorProto.INT8}
    assert "dB" in compare_with_integers(path, plan_of(model))
    if "Choice" in name:
        given = {key: value.flatten(0, 1) for key, value in given.items()}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {key: value.numpy() for key, value in given.items()})
    mask = given["attention_mask"].bool()
    for output, values in zip(session.get_outputs(), found, strict=True):
        real = expected[output.name].flatten(0, 1)[:, None] if "Choice" in name else expected[output.name]
        rows = mask if real.shape[:2] == mask.shape and "Choice" not in name else slice(None)
        near = torch.from_numpy(values)[rows] - real[rows]
        assert float(near.square().sum()) < 10**-1.4 * float(real[rows].square().sum()), output.name


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict]:
    model, given, expected = quantized("MegatronBertForSequenceClassification")
    model.save_pretrained(tmp_path / "model")
    save_ranges(model, tmp_path / "model")
    return tmp_path / "model", {"given": given, "logits": expected.logits}


@pytest.mark.parametrize("to", ["integer", "onnx"])
def test_the_command(to: str, saved: tuple[Path, dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, values = saved
    out = tmp_path / "out"
    assert main(["export", str(source), str(out), "--to", to]) == 0
    said = capsys.readouterr().out
    assert "of float32" in said
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "integer_plan.safetensors" if to == "integer" else "model.onnx"}
    if to == "integer":
        assert torch.equal(IntegerModel.from_pretrained(out)(**values["given"]).logits, values["logits"])
        for source_of_plan in (out / "integer_plan.safetensors", out):
            assert main(["inspect", str(source_of_plan)]) == 0
            assert "integer plan, version 1, arithmetic 2" in capsys.readouterr().out
    else:
        assert "agrees with the integer engine to" in said
    assert main(["export", str(source), str(out), "--to", to]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_plan_that_is_damaged_or_to_be_converted_is_called_a_plan(
    saved: tuple[Path, dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(saved[0]), str(out), "--to", "integer"]) == 0
    plan, elsewhere = out / "integer_plan.safetensors", tmp_path / "elsewhere.safetensors"
    for source in (out, plan, shutil.copy(plan, elsewhere)):
        assert main(["convert", str(source), str(tmp_path / "converted"), "--to", "native"]) == 2
        assert "is an integer plan, which holds no weights" in capsys.readouterr().err
    for damaged in (plan, elsewhere):
        damaged.write_bytes(damaged.read_bytes()[:-200])
    for source in (out, plan, elsewhere):
        assert main(["inspect", str(source)]) == 2
        assert "is a damaged integer plan" in capsys.readouterr().err
    plan.unlink()
    plan.mkdir()
    assert main(["inspect", str(out)]) == 2
    assert "is a directory, where a plan is a file" in capsys.readouterr().err


def test_a_float_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), str(tmp_path / "out"), "--to", "integer"]) == 2
    assert "holds no quantization.json" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out"), "--to", "integer"]) == 2
    assert "nowhere is not there: check the path" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
