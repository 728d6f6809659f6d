# SPDX-License-Identifier: Apache-2.0
"""Inference of one encoder on a GPU in integers, beside PyTorch in bfloat16 with the same weights, compiled and not.

As in :mod:`benchmarks.inference`, systems alternate in one process, and rows of other calls stay in the report. It has
not run on a GPU yet, so there is none.

    python -m benchmarks.inference_gpu --rows 128x128 32x512 1x128 1x512
    TRITON_INTERPRET=1 python -m benchmarks.inference_gpu --shape tiny --rows 1x4 --systems integer "torch bf16"

The second command needs no GPU, and shows that the first has everything it needs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import earlier_report, provenance
from benchmarks.inference import Ready, closeness, measure, ratios
from benchmarks.inference_systems import SHAPES, Models, Run, is_wanted
from megatron_bert.ending import command
from megatron_bert.ibert import IntegerModel
from megatron_bert.ibert.engine.cuda import CudaBackend
from parallel.errors import UserError
from parallel.whole_files import write_json


def _row(text: str) -> tuple[int, int]:
    batch, _, length = text.partition("x")
    if not (batch.isdigit() and length.isdigit() and int(batch) and int(length)):
        raise UserError(f"--rows has {text!r}: give sequences x tokens of each, as in 128x128")
    return int(batch), int(length)


def systems(models: Models, device: torch.device, weight_bits: list[int]) -> dict[str, Callable[[], Run]]:
    """How each system is made ready on a device, by its name in the report."""

    def ours(bits: int) -> Run:
        model = IntegerModel.from_pretrained(models.integer_plan(bits), "cuda")
        return lambda ids: model(ids).last_hidden_state

    def theirs(compiled: bool) -> Run:
        model = models.theirs().bfloat16().to(device)
        return torch.inference_mode()(torch.compile(model) if compiled else model.forward)

    found: dict[str, Callable[[], Run]] = {f"integer W{bits}A8 cuda": partial(ours, bits) for bits in weight_bits}
    return found | {"torch bf16": partial(theirs, False), "torch compile bf16": partial(theirs, True)}


def _ready(models: Models, device: torch.device, arguments: argparse.Namespace) -> dict[str, Ready]:
    ids = models.ids(1, 32)
    with torch.inference_mode():
        expected = models.theirs()(ids).double()
    ready = {}
    for name, make in systems(models, device, arguments.weight_bits).items():
        if is_wanted(name, arguments.systems):
            run = make()
            ready[name] = Ready(run, {"signal_to_noise_db": closeness(run(ids.to(device)).cpu(), expected)})
    return ready


@command("inference_gpu")
def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="large")
    parser.add_argument("--rows", nargs="+", default=["128x128", "32x512", "1x128", "1x512"], help="sequences x tokens")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each system")
    parser.add_argument("--weight-bits", type=int, nargs="+", choices=(7, 8), default=[8])
    parser.add_argument("--systems", nargs="+", default=[], help="only those whose names have one of these parts")
    parser.add_argument("--models", type=Path, default=Path("inference-models"), help="folder for models, kept")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/inference_gpu.json"))
    arguments = parser.parse_args()
    rows = [_row(text) for text in arguments.rows]
    device = CudaBackend().device
    models = Models(arguments.models, arguments.shape)
    report = {"rows": {}} | earlier_report(arguments.output)
    report |= provenance("inference_gpu", "transformers", "triton", device=device)
    ready = _ready(models, device, arguments)
    for batch, length in rows:
        times = measure(ready, models.ids(batch, length).to(device), arguments.rounds, arguments.seconds)
        key = f"{arguments.shape} B{batch} S{length}"
        report["rows"][key] = {"times": times, "ratios": ratios(times)}
        write_json(arguments.output, report)
        print(json.dumps({key: report["rows"][key]}, indent=2), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
