# SPDX-License-Identifier: Apache-2.0
"""The subcommand `export`."""

from __future__ import annotations

import argparse
import shutil
from typing import Any

from megatron_bert.arguments import given_path
from parallel.errors import UserError

#: Endings of files of a model's directory that hold weights or what belongs to them, and stay behind, as its ranges do.
_WEIGHTS = (".safetensors", ".bin", ".onnx", ".index.json")


def add_export_command(commands: Any) -> None:
    """Add the subcommand."""
    export = commands.add_parser("export", help="write a quantized model as an integer plan, or as ONNX")
    export.add_argument(
        "model", type=given_path, metavar="MODEL", help="a run of quantize, or a quantized model's directory"
    )
    export.add_argument("destination", type=given_path, metavar="DST", help="directory to write; it must not be there")
    export.add_argument(
        "--to",
        choices=("integer", "onnx"),
        required=True,
        help="integer: a directory that IntegerModel, evaluate and predict run without float weights; onnx: a graph "
        "with QuantizeLinear and DequantizeLinear at this model's ranges, for onnxruntime and OpenVINO",
    )
    export.set_defaults(func=_export)


def _export(arguments: argparse.Namespace) -> None:
    from megatron_bert.convert.ranges import RANGES_NAME
    from megatron_bert.exporting.quantized import load_quantized, quantized_directory
    from megatron_bert.ibert.engine.parts import plan_of
    from megatron_bert.ibert.engine.plan_file import PLAN_NAME, write_plan
    from parallel.whole_files import reporting, whole_directory

    source, destination = quantized_directory(arguments.model), arguments.destination
    if destination.exists():
        raise UserError(f"{destination} is there already: give another directory, or remove it first")
    model = load_quantized(source)
    plan = plan_of(model)
    with reporting("written", destination, "give another directory"), whole_directory(destination) as directory:
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.endswith((*_WEIGHTS, RANGES_NAME)):
                shutil.copyfile(path, directory / path.name)
        if arguments.to == "integer":
            write_plan(plan, directory / PLAN_NAME)
            written = (directory / PLAN_NAME).stat().st_size
            said = ""
        else:
            from megatron_bert.exporting.onnx_check import compare_with_integers
            from megatron_bert.exporting.onnx_graph import MODEL_NAME, write_onnx

            write_onnx(model, directory / MODEL_NAME)
            written = (directory / MODEL_NAME).stat().st_size
            said = f"; {compare_with_integers(directory / MODEL_NAME, plan)}"
    floats = 4 * sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote {destination}: {written:,} bytes, {written / floats:.1%} of float32{said}")
