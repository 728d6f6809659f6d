# SPDX-License-Identifier: Apache-2.0
"""Inference of one encoder in integers, beside PyTorch, ONNX Runtime and OpenVINO with the same weights.

All systems answer the same token ids in one process; they alternate, so that a machine whose speed drifts does not
favor one. A row of the report is a shape, batch, length and number of threads; rows of other calls stay in it, so that
a long measurement can be made in pieces.

    pip install '.[test,benchmark]'
    python -m tools.benchmark_inference --shape base --batch 1 --length 128 --threads 1
    python -m tools.benchmark_inference --draw

Environment variables limit the instructions of those that allow it: MEGATRON_BERT_CPU_TARGET (ours; ``--targets``
measures several), ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY (PyTorch). They are in the report.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_bert import MegatronBertConfig, MegatronBertModel
from megatron_bert.ending import command
from megatron_bert.ibert import IntegerModel, QuantizationConfig, calibrate, freeze_ranges, quantize_model
from megatron_bert.ibert.engine.plan_file import read_plan
from parallel.errors import UserError
from parallel.whole_files import write_text
from tools.peers import transformers
from tools.timing import processor_name

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
_VOCABULARY, _POSITIONS = 30522, 512
_VARIABLES = ("MEGATRON_BERT_CPU_TARGET", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")

#: Answers token ids ``[B, S]`` with the final hidden states.
_Run = Callable[[Tensor], Any]
#: Makes a system ready, and says which file it reads.
_System = tuple[Callable[[], _Run], Callable[[], Path]]


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
        folder: for the files.
        shape: a name of ``SHAPES``.
        weight_bits: of ours.
    """

    def __init__(self, folder: Path, shape: str, weight_bits: int) -> None:
        self.folder, self.shape = folder / shape, shape
        self.plan = self.folder / f"integer-w{weight_bits}.safetensors"
        self.weight_bits = weight_bits
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

    def integer_plan(self) -> Path:
        """Ours, calibrated on random token ids."""
        if not _is_readable(self.plan):
            model = MegatronBertModel.from_pretrained(self.hugging_face()).eval()
            quantize_model(model, QuantizationConfig(weight_bits=self.weight_bits))
            calibrate(model, [self.ids(2, 128, seed) for seed in (1, 2)], lambda ids: model(input_ids=ids))
            freeze_ranges(model)
            IntegerModel.from_model(model, backend="reference").save(self.plan)
        return self.plan

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
    """Whether there is a plan that this release can read."""
    try:
        read_plan(plan)
    except UserError:
        return False
    return True


def _torch_run(model: Callable[[Tensor], Tensor]) -> _Run:
    @torch.inference_mode()
    def run(ids: Tensor) -> Tensor:
        return model(ids)

    return run


def _onnx_run(path: Path, threads: int) -> _Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda ids: session.run(None, {"ids": ids.numpy()})[0]


def _openvino_run(path: Path, threads: int, precision: str) -> _Run:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Core().compile_model(str(path), "CPU", settings)
    request = model.create_infer_request()
    return lambda ids: request.infer([ids.numpy()])[model.output(0)]


def _integer_run(models: Models, threads: int, target: str | None) -> _Run:
    before = os.environ.get("MEGATRON_BERT_CPU_TARGET")
    if target is not None:
        os.environ["MEGATRON_BERT_CPU_TARGET"] = target
    try:
        model = IntegerModel.from_pretrained(models.integer_plan(), "cpu", threads)
    finally:
        if before is None:
            os.environ.pop("MEGATRON_BERT_CPU_TARGET", None)
        else:
            os.environ["MEGATRON_BERT_CPU_TARGET"] = before
    return lambda ids: model(ids).last_hidden_state


def systems(models: Models, threads: int, targets: list[str]) -> dict[str, _System]:
    """How each system is made ready, and the file it reads, by its name in the report."""

    def dynamic() -> _Run:
        kind = {nn.Linear}
        return _torch_run(torch.ao.quantization.quantize_dynamic(models.theirs(), kind, torch.qint8))

    ours = f"integer W{models.weight_bits}A8"
    weights = models.hugging_face
    found: dict[str, _System] = {
        f"{ours} {target}": (lambda target=target: _integer_run(models, threads, target), models.integer_plan)
        for target in targets
    }
    return found | {
        "torch fp32": (lambda: _torch_run(models.theirs()), weights),
        "torch compile fp32": (lambda: _torch_run(torch.compile(models.theirs())), weights),
        "torch bf16": (lambda: _torch_run(models.theirs().bfloat16()), weights),
        "torch compile bf16": (lambda: _torch_run(torch.compile(models.theirs().bfloat16())), weights),
        "torch dynamic int8": (dynamic, weights),
        "onnxruntime fp32": (lambda: _onnx_run(models.onnx(), threads), models.onnx),
        "onnxruntime dynamic int8": (lambda: _onnx_run(models.onnx_int8(), threads), models.onnx_int8),
        "openvino fp32": (lambda: _openvino_run(models.onnx(), threads, "f32"), models.onnx),
        "openvino bf16": (lambda: _openvino_run(models.onnx(), threads, "bf16"), models.onnx),
        "openvino nncf int8": (lambda: _openvino_run(models.nncf_int8(), threads, "f32"), models.nncf_int8),
        "openvino nncf int8 and bf16": (lambda: _openvino_run(models.nncf_int8(), threads, "bf16"), models.nncf_int8),
        "transformers IBert": (lambda: _simulated(models), weights),
    }


def _simulated(models: Models) -> _Run:
    """Transformers' IBert with quant_mode, of the same size (its weights are random: it has post-layer-norm)."""
    config = transformers.IBertConfig(
        vocab_size=_VOCABULARY, max_position_embeddings=_POSITIONS + 2, quant_mode=True, **SHAPES[models.shape]
    )
    model = transformers.IBertModel(config).eval()
    return _torch_run(lambda ids: model(ids).last_hidden_state)


def _file_size(path: Path) -> int:
    """Bytes of a model: of its directory, or of its file and what lies beside it under the same name."""
    if path.is_dir():
        return sum(each.stat().st_size for each in path.glob("*.safetensors"))
    data = path.with_suffix(".bin")
    return path.stat().st_size + (data.stat().st_size if path.suffix == ".xml" else 0)


def _closeness(answer: Any, expected: Tensor) -> float:
    """Signal to noise of an answer in decibels, against that of torch in float32."""
    got = torch.as_tensor(answer).double()
    noise = (got - expected).square().sum().clamp(min=1e-30)
    return round(float(10 * torch.log10(expected.square().sum() / noise)), 1)


def measure(arguments: argparse.Namespace, models: Models) -> dict[str, Any]:
    """Milliseconds of each system, alternating."""
    torch.set_num_threads(arguments.threads)
    ids = models.ids(arguments.batch, arguments.length)
    available = systems(models, arguments.threads, arguments.targets)
    wanted = [name for name in available if not arguments.systems or any(part in name for part in arguments.systems)]
    runs: dict[str, _Run] = {}
    results: dict[str, Any] = {}
    with torch.inference_mode():
        expected = models.theirs()(ids).double()
    for name in wanted:
        try:
            run = available[name][0]()
            answer = run(ids)
        except (ImportError, UserError, RuntimeError) as error:
            print(f"{name} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        runs[name] = run
        results[name] = {"file_megabytes": round(_file_size(available[name][1]()) / 1e6, 1)}
        if not name.startswith("transformers"):
            results[name]["signal_to_noise_db"] = _closeness(answer, expected)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run(ids)
            taken[name].append((time.perf_counter() - began) * 1e3)
    for name, times in taken.items():
        results[name] |= {"milliseconds": round(min(times), 2), "median": round(statistics.median(times), 2)}
    return results


def _child(name: str, arguments: argparse.Namespace, models: Models) -> None:
    """In a process of its own: memory and time to the first answer of one system."""
    torch.set_num_threads(arguments.threads)
    ids = models.ids(arguments.batch, arguments.length)
    gc.collect()
    began = time.perf_counter()
    run = systems(models, arguments.threads, arguments.targets)[name][0]()
    run(ids)
    first = time.perf_counter() - began
    run(ids)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps({"first_answer_seconds": round(first, 3), "resident_megabytes": resident >> 10, "peak": peak >> 10})
    )


def memory(arguments: argparse.Namespace, models: Models) -> dict[str, Any]:
    """Resident memory and time to the first answer of each system, and of Python with torch alone."""
    found: dict[str, Any] = {}
    for name in systems(models, arguments.threads, arguments.targets):
        if arguments.systems and not any(part in name for part in arguments.systems):
            continue
        done = subprocess.run(
            [sys.executable, "-m", "tools.benchmark_inference", *sys.argv[1:], "--child", name],
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of how many times as fast as the fastest float32 each system is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {key: row for key, row in report["rows"].items() if "times" in row}
    names = sorted({name for row in rows.values() for name in row["times"]})
    figure, axes = pyplot.subplots(figsize=(max(8, 1.6 * len(rows)), 6))
    for place, name in enumerate(names):
        x, y = [], []
        for column, row in enumerate(rows.values()):
            if name in row["times"]:
                x.append(column + 0.8 * place / len(names))
                y.append(_fastest(row["times"], "fp32") / row["times"][name]["milliseconds"])
        axes.bar(x, y, 0.8 / len(names), label=name, color=pyplot.get_cmap("tab20")(place % 20))
    axes.set_xticks([column + 0.4 for column in range(len(rows))], list(rows), rotation=20, ha="right")
    axes.set_ylabel("speed, the fastest float32 = 1")
    axes.set_title(report["machine"])
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _fastest(times: dict[str, Any], kind: str) -> float:
    """Milliseconds of the fastest peer whose name has ``kind``."""
    found = [row["milliseconds"] for name, row in times.items() if kind in name and not name.startswith("integer")]
    return min(found, default=float("nan"))


def ratios(times: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times as fast ours is as the fastest peer of each kind."""
    return {
        name: {kind: round(_fastest(times, kind) / row["milliseconds"], 2) for kind in ("fp32", "bf16", "int8")}
        for name, row in times.items()
        if name.startswith("integer")
    }


@command("benchmark_inference")
def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="base")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--length", type=int, default=128, help="tokens of each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--weight-bits", type=int, choices=(7, 8), default=8)
    parser.add_argument("--targets", nargs="+", default=["amx", "avx512", "avxvnni", "avx2"], help="of ours")
    parser.add_argument("--systems", nargs="+", default=[], help="only those whose names have one of these parts")
    parser.add_argument("--memory", action="store_true", help="measure memory and the time to the first answer")
    parser.add_argument("--models", type=Path, default=Path("inference-models"), help="folder for models, kept")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/inference_cpu.json"))
    parser.add_argument("--draw", action="store_true", help="only draw the report's PNG")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    models = Models(arguments.models, arguments.shape, arguments.weight_bits)
    if arguments.child:
        return _child(arguments.child, arguments, models)
    report: dict[str, Any] = {"machine": processor_name(), "rows": {}}
    if arguments.output.is_file():
        report = json.loads(arguments.output.read_text(encoding="utf-8"))
    if arguments.draw:
        return draw(report, arguments.output.with_suffix(".png"))
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    key = f"{arguments.shape} B{arguments.batch} S{arguments.length} T{arguments.threads}"
    key += "".join(f" {name}={value}" for name, value in variables.items())
    row = report["rows"].setdefault(key, {})
    if arguments.memory:
        row.setdefault("memory", {}).update(memory(arguments, models))
    else:
        times = row.setdefault("times", {})
        times.update(measure(arguments, models))
        row["ratios"] = ratios(times)
    write_text(arguments.output, json.dumps(report, indent=2) + "\n")
    print(json.dumps({key: row}, indent=2))
    return None


if __name__ == "__main__":
    main()
