# SPDX-License-Identifier: Apache-2.0
"""One encoder as each system of :mod:`benchmarks.inference` runs it, with the same weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers import transformers
from megatron_bert import MegatronBertConfig, MegatronBertModel
from megatron_bert.ibert import IntegerModel, QuantizationConfig, calibrate, freeze_ranges, quantize_model
from parallel.errors import UserError

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
_VOCABULARY, _POSITIONS = 30522, 512
#: Chooses an instruction set of ours.
TARGET_VARIABLE = "MEGATRON_BERT_CPU_TARGET"

#: Answers token ids ``[B, S]`` with the final hidden states.
Run = Callable[[Tensor], Any]
#: Makes a system ready, and says which file it reads.
System = tuple[Callable[[], Run], Callable[[], Path]]


def is_wanted(name: str, parts: list[str]) -> bool:
    """Whether a system is measured: its name has one of some parts, or there are none."""
    return not parts or any(part in name for part in parts)


class _Plain(nn.Module):
    """transformers' model without masks and options: with fused attention, or as exporters follow it at any length."""

    def __init__(self, model: Any, fused: bool) -> None:
        super().__init__()
        self.model, self.fused = model, fused

    def forward(self, ids: Tensor) -> Tensor:
        table, encoder = self.model.embeddings, self.model.encoder
        x = table.word_embeddings(ids) + table.position_embeddings.weight[: ids.shape[1]]
        x = x + table.token_type_embeddings.weight[0]
        for layer in encoder.layer:
            attention = layer.attention
            h, own = attention.ln(x), attention.self
            query, key, value = (
                projection(h).unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2)
                for projection in (own.query, own.key, own.value)
            )
            if self.fused:
                context = nn.functional.scaled_dot_product_attention(query, key, value)
            else:
                context = (query @ key.transpose(-1, -2) / own.attention_head_size**0.5).softmax(-1) @ value
            x = x + attention.output.dense(context.transpose(1, 2).flatten(2))
            x = x + layer.output.dense(nn.functional.gelu(layer.intermediate.dense(layer.ln(x))))
        return encoder.ln(x)


class Models:
    """One model in the formats of all systems, made once in a folder and kept there.

    Args:
        shape: a name of ``SHAPES``.
    """

    def __init__(self, folder: Path, shape: str) -> None:
        self.folder, self.shape = folder / shape, shape
        self.folder.mkdir(parents=True, exist_ok=True)

    def ids(self, batch: int, length: int, seed: int = 0) -> Tensor:
        """Random token ids."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(5, _VOCABULARY, (batch, length), generator=generator)

    def hugging_face(self) -> Path:
        """Random weights; norms and biases are not those of a new model, which would be too easy."""
        path = self.folder / "float"
        if not (path / "config.json").is_file():
            torch.manual_seed(0)
            model = MegatronBertModel(
                MegatronBertConfig(vocab_size=_VOCABULARY, max_position_embeddings=_POSITIONS, **SHAPES[self.shape])
            )
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter) * (0.2 if name.endswith("weight") else 0.05))
            model.save_pretrained(path)
        return path

    def theirs(self, fused: bool = True) -> nn.Module:
        """The model of transformers."""
        return _Plain(transformers.MegatronBertModel.from_pretrained(self.hugging_face()), fused).eval()

    def integer_plan(self, weight_bits: int = 8) -> Path:
        """Ours, calibrated on random token ids."""
        path = self.folder / f"integer-w{weight_bits}.safetensors"
        if not _is_readable(path):
            model = MegatronBertModel.from_pretrained(self.hugging_face()).eval()
            quantize_model(model, QuantizationConfig(weight_bits=weight_bits))
            calibrate(model, [self.ids(2, 128, seed) for seed in (1, 2)], lambda ids: model(input_ids=ids))
            freeze_ranges(model)
            IntegerModel.from_model(model, backend="reference").save(path)
        return path

    def onnx(self) -> Path:
        """For ONNX Runtime and OpenVINO."""
        path = self.folder / "model.onnx"
        if not path.is_file():
            axes = {"ids": {0: "batch", 1: "length"}, "hidden": {0: "batch", 1: "length"}}
            torch.onnx.export(
                self.theirs(fused=False),
                (self.ids(2, 16),),
                str(path),
                input_names=["ids"],
                output_names=["hidden"],
                dynamic_axes=axes,
                opset_version=17,
                dynamo=False,
            )
        return path

    def onnx_int8(self) -> Path:
        """Dynamic quantization of ONNX Runtime."""
        path = self.folder / "dynamic-int8.onnx"
        if not path.is_file():
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(self.onnx(), path, weight_type=QuantType.QInt8, per_channel=True)
        return path

    def nncf_int8(self) -> Path:
        """Static quantization of NNCF."""
        path = self.folder / "nncf-int8.xml"
        if not path.is_file():
            import nncf
            import openvino

            model = openvino.Core().read_model(self.onnx())
            data = nncf.Dataset([self.ids(1, 128, seed).numpy() for seed in range(1, 5)])
            model = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=4)
            openvino.save_model(model, path, compress_to_fp16=False)
        return path


def _is_readable(plan: Path) -> bool:
    """Whether there is a plan that this release can run."""
    try:
        IntegerModel.from_pretrained(plan, "reference")
    except UserError:
        return False
    return True


def _torch_run(model: Callable[[Tensor], Tensor]) -> Run:
    @torch.inference_mode()
    def run(ids: Tensor) -> Tensor:
        return model(ids)

    return run


def onnx_run(path: Path, threads: int, *names: str) -> Callable[..., Any]:
    """What runs a graph on arrays or tensors, its inputs of these names, in ONNX Runtime; 0 threads are its choice."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda *given: session.run(None, dict(zip(names, map(np.asarray, given), strict=True)))[0]


def openvino_run(model: Any, precision: str, **settings: Any) -> Callable[..., Any]:
    """The same in OpenVINO, of a graph or the path of one."""
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision, **settings})
    request = compiled.create_infer_request()
    return lambda *given: request.infer(list(map(np.asarray, given)))[compiled.output(0)]


def _integer_run(plan: Path, threads: int, target: str | None) -> Run:
    before = os.environ.get(TARGET_VARIABLE)
    if target is not None:
        os.environ[TARGET_VARIABLE] = target
    try:
        model = IntegerModel.from_pretrained(plan, "cpu", threads)
    finally:
        if before is None:
            os.environ.pop(TARGET_VARIABLE, None)
        else:
            os.environ[TARGET_VARIABLE] = before
    return lambda ids: model(ids).last_hidden_state


def systems(models: Models, threads: int, targets: list[str], weight_bits: list[int]) -> dict[str, System]:
    """How each system is made ready, and the file it reads, by its name in the report.

    Args:
        targets: ours with the instruction sets of these names.
    """

    def dynamic() -> Run:
        kind = {nn.Linear}
        return _torch_run(torch.ao.quantization.quantize_dynamic(models.theirs(), kind, torch.qint8))

    def onnx(path: Path) -> Run:
        return onnx_run(path, threads, "ids")

    def openvino(path: Path, precision: str) -> Run:
        return openvino_run(str(path), precision, INFERENCE_NUM_THREADS=threads, PERFORMANCE_HINT="LATENCY")

    weights = models.hugging_face
    found: dict[str, System] = {
        f"integer W{bits}A8 {target}": (
            lambda bits=bits, target=target: _integer_run(models.integer_plan(bits), threads, target),
            lambda bits=bits: models.integer_plan(bits),
        )
        for target in targets
        for bits in weight_bits
    }
    return found | {
        "torch fp32": (lambda: _torch_run(models.theirs()), weights),
        "torch compile fp32": (lambda: _torch_run(torch.compile(models.theirs())), weights),
        "torch bf16": (lambda: _torch_run(models.theirs().bfloat16()), weights),
        "torch compile bf16": (lambda: _torch_run(torch.compile(models.theirs().bfloat16())), weights),
        "torch dynamic int8": (dynamic, weights),
        "onnxruntime fp32": (lambda: onnx(models.onnx()), models.onnx),
        "onnxruntime dynamic int8": (lambda: onnx(models.onnx_int8()), models.onnx_int8),
        "openvino fp32": (lambda: openvino(models.onnx(), "f32"), models.onnx),
        "openvino bf16": (lambda: openvino(models.onnx(), "bf16"), models.onnx),
        "openvino nncf int8": (lambda: openvino(models.nncf_int8(), "f32"), models.nncf_int8),
        "openvino nncf int8 and bf16": (lambda: openvino(models.nncf_int8(), "bf16"), models.nncf_int8),
        "transformers IBert": (lambda: _simulated(models), weights),
    }


def _simulated(models: Models) -> Run:
    """Transformers' IBert with quant_mode, of the same size (its weights are random: it has post-layer-norm)."""
    config = transformers.IBertConfig(
        vocab_size=_VOCABULARY, max_position_embeddings=_POSITIONS + 2, quant_mode=True, **SHAPES[models.shape]
    )
    model = transformers.IBertModel(config).eval()
    return _torch_run(lambda ids: model(ids).last_hidden_state)
