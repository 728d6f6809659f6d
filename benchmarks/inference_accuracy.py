# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a quantized classifier and of what PyTorch, ONNX Runtime and OpenVINO make of the float one.

All read the same sentences. Ours is the run of `megatron-bert quantize`; the others quantize the float model that it
began with, each in its own way.

    python -m benchmarks.inference_accuracy --float runs/float --quantized runs/int8 --data dev.tsv
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import earlier_report
from benchmarks.inference_systems import onnx_run, openvino_run
from benchmarks.peers import transformers
from megatron_bert.ending import command
from megatron_bert.ibert import NativeModel
from parallel.errors import UserError
from parallel.whole_files import write_json

#: Logits of token ids and masks ``[B, S]``.
_Run = Callable[[np.ndarray, np.ndarray], Any]


class _Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask).logits


def _torch(model: nn.Module) -> _Run:
    @torch.inference_mode()
    def run(ids: np.ndarray, mask: np.ndarray) -> Any:
        return model(torch.from_numpy(ids), torch.from_numpy(mask)).float().numpy()

    return run


def _ours(run: Path) -> _Run:
    model = NativeModel(run)
    return lambda ids, mask: model.logits([row[: int(n)].tolist() for row, n in zip(ids, mask.sum(1), strict=True)])


def peers(directory: Path, folder: Path, ids: np.ndarray, mask: np.ndarray) -> dict[str, Callable[[], _Run]]:
    """How each makes the float model ready, by its name; those that need it are calibrated on ``ids``."""
    model = _Logits(
        transformers.AutoModelForSequenceClassification.from_pretrained(directory, attn_implementation="eager")
    ).eval()
    path, dynamic = folder / "model.onnx", folder / "dynamic.onnx"

    def exported() -> Path:
        if not path.is_file():
            axes = {name: {0: "batch", 1: "length"} for name in ("ids", "mask")}
            given = (torch.from_numpy(ids[:2]), torch.from_numpy(mask[:2]))
            names = {"input_names": ["ids", "mask"], "output_names": ["logits"]}
            torch.onnx.export(model, given, str(path), dynamic_axes=axes, opset_version=17, dynamo=False, **names)
        return path

    def onnx_int8() -> _Run:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(exported(), dynamic, weight_type=QuantType.QInt8, per_channel=True)
        return onnx_run(dynamic, 0, "ids", "mask")

    def nncf_int8() -> _Run:
        import nncf
        import openvino

        data = nncf.Dataset([[ids[i : i + 1], mask[i : i + 1]] for i in range(len(ids))])
        read = openvino.Core().read_model(exported())
        quantized = nncf.quantize(read, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(ids))
        return openvino_run(quantized, "bf16")

    return {
        "torch fp32": lambda: _torch(model),
        "torch dynamic int8": lambda: _torch(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)),
        "onnxruntime fp32": lambda: onnx_run(exported(), 0, "ids", "mask"),
        "onnxruntime dynamic int8": onnx_int8,
        "openvino bf16": lambda: openvino_run(str(exported()), "bf16"),
        "openvino nncf int8 and bf16": nncf_int8,
        "torch bf16": lambda: _torch(model.bfloat16()),  # last, as it changes the model
    }


@command("inference_accuracy")
def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--float", type=Path, required=True, help="run of `finetune`")
    parser.add_argument("--quantized", type=Path, required=True, help="run of `quantize`")
    parser.add_argument("--data", type=Path, required=True, help="table with the columns sentence and label")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--calibrate", type=int, default=64, help="sentences for those that calibrate")
    parser.add_argument("--output", type=Path, help="a report of benchmarks.inference to write into")
    arguments = parser.parse_args()
    with open(arguments.data, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or not {"sentence", "label"} <= rows[0].keys():
        raise UserError(f"{arguments.data} has no columns sentence and label")
    directory = arguments.float / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    encoded = tokenizer(
        [row["sentence"] for row in rows],
        truncation=True,
        max_length=arguments.max_length,
        padding="max_length",
        return_tensors="np",
    )
    ids, mask = (encoded[name].astype(np.int64) for name in ("input_ids", "attention_mask"))
    labels = list(transformers.AutoConfig.from_pretrained(directory).id2label.values())
    gold = np.array([labels.index(row["label"]) for row in rows])
    accuracy: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        some = slice(0, arguments.calibrate)
        systems = peers(directory, Path(folder), ids[some], mask[some])
        systems["integer W8A8"] = lambda: _ours(arguments.quantized)
        for name, make in systems.items():
            try:
                run = make()
            except ImportError as error:
                print(f"{name} is left out: {error}")
                continue
            answers = [np.asarray(run(ids[i : i + 50], mask[i : i + 50])).argmax(-1) for i in range(0, len(ids), 50)]
            accuracy[name] = round(float((np.concatenate(answers) == gold).mean()), 4)
    found = {"examples": len(rows), "accuracy": accuracy}
    print(json.dumps(found, indent=2))
    if arguments.output:
        write_json(arguments.output, earlier_report(arguments.output) | {"task": found})


if __name__ == "__main__":
    main()
