# SPDX-License-Identifier: Apache-2.0
"""What a process costs that does nothing but answer: memory, and time from its start to the first answer.

Each system gets processes that import what it needs and no more, and answer twice; medians are reported, without the
first process, which finds the files of its libraries on the disk.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.inference_systems import Models, is_wanted

#: Processes of each system that count.
_PROCESSES = 3
#: What each system does, after ``ids = [[..], ..]``: makes a function `run` ready.
_TORCH = """
import torch
torch.set_num_threads({threads})
given = torch.tensor(ids)
"""
_PEER = """
from transformers import MegatronBertModel
model = MegatronBertModel.from_pretrained({weights!r}, dtype=torch.{dtype}).eval()
"""
_EAGER = """
@torch.inference_mode()
def run(): return model(given)
"""
_PROGRAMS = {
    "python and torch": _TORCH + "run = lambda: None",
    "python and numpy": "import numpy\nrun = lambda: None",
    "integer W8A8 (NativeModel)": """
from megatron_bert.ibert import NativeModel
model = NativeModel({plan!r}, {threads})
run = lambda: model.hidden_states(ids)
""",
    "integer W8A8 (IntegerModel)": _TORCH
    + """
from megatron_bert.ibert import IntegerModel
model = IntegerModel.from_pretrained({plan!r}, "cpu", {threads})
run = lambda: model(given)
""",
    "torch fp32": _TORCH + _PEER.replace("{dtype}", "float32") + _EAGER,
    "torch bf16": _TORCH + _PEER.replace("{dtype}", "bfloat16") + _EAGER,
    "onnxruntime dynamic int8": """
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = {threads}, 1
session = onnxruntime.InferenceSession({onnx_int8!r}, options, providers=["CPUExecutionProvider"])
run = lambda: session.run(None, {{"ids": numpy.array(ids)}})
""",
    "openvino nncf int8 and bf16": """
import numpy, openvino
settings = {{"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": {threads}, "PERFORMANCE_HINT": "LATENCY"}}
request = openvino.Core().compile_model({nncf!r}, "CPU", settings).create_infer_request()
run = lambda: request.infer([numpy.array(ids)])
""",
}
_AFTER = """
import json, time
run()
first = time.time()
run()
lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(json.dumps({"first": first} | {key: int(lines[key].split()[0]) >> 10 for key in ("VmRSS", "VmHWM")}))
"""


def memory(models: Models, batch: int, length: int, threads: int, wanted: list[str]) -> dict[str, Any]:
    """Megabytes while a system runs and at most, and seconds from the start of its process to the first answer.

    Args:
        wanted: parts of names of systems; all where there is none.
    """
    ids = models.ids(batch, length).tolist()
    found: dict[str, Any] = {}
    for name, program in _PROGRAMS.items():
        if not is_wanted(name, wanted):
            continue
        # Only the formats that the program reads are made.
        places = {"threads": threads, "weights": str(models.hugging_face())}
        makers = {"plan": models.integer_plan, "onnx_int8": models.onnx_int8, "nncf": models.nncf_int8}
        places |= {key: str(make()) for key, make in makers.items() if f"{{{key}!r}}" in program}
        code = f"ids = {ids}\n{program.format(**places)}\n{_AFTER}"
        reports = []
        for _ in range(1 + _PROCESSES):
            began = time.time()
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            if done.returncode != 0:
                print(f"{name} is left out: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                break
            report = json.loads(done.stdout.splitlines()[-1])
            reports.append(report | {"first": report["first"] - began})
        else:
            first, resident, peak = (
                statistics.median(report[key] for report in reports[1:]) for key in ("first", "VmRSS", "VmHWM")
            )
            found[name] = {
                "first_answer_seconds": round(first, 2),
                "resident_megabytes": resident,
                "peak_megabytes": peak,
            }
    return found
