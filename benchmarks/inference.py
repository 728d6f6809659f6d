# SPDX-License-Identifier: Apache-2.0
"""Inference of one encoder in integers, beside PyTorch, ONNX Runtime and OpenVINO with the same weights.

All systems answer the same token ids in one process; they alternate, so that a machine whose speed drifts does not
favor one. A row of the report is a shape, batch, length and number of threads; rows of other calls stay in it, so that
a long measurement can be made in pieces.

    pip install '.[test,benchmark]'
    python -m benchmarks.inference --shape base --batch 1 8 --length 32 128 512 --threads 1
    python -m benchmarks.inference --draw

``--instructions`` measures what an older processor would run: the newer instruction sets are hidden from all systems
alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import earlier_report, provenance
from benchmarks.inference_memory import memory
from benchmarks.inference_systems import SHAPES, Models, Run, is_wanted, systems
from benchmarks.timing import seconds
from megatron_bert.ending import command
from parallel.errors import UserError
from parallel.whole_files import write_json, write_picture

#: What newer instruction sets are hidden for: the variable that says so to benchmarks/hidden_instructions.c.
_HIDDEN = "HIDDEN_INSTRUCTIONS"
KINDS = ("fp32", "bf16", "int8")
#: Packages of the peers beside torch.
PEERS = ("transformers", "onnxruntime", "openvino", "nncf")


def hide_instructions(level: str) -> None:
    """Start this command again with newer instruction sets hidden from every library of the process.

    Args:
        level: the newest that stays, ``avx512`` or ``avx2``.

    Raises:
        UserError: there is no C compiler, or this machine cannot hide them.
    """
    if os.environ.get(_HIDDEN) == level:
        return
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "hidden_instructions.so"
        source = Path(__file__).with_name("hidden_instructions.c")
        try:
            subprocess.run(["cc", "-O2", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"cannot compile {source.name} ({error}): install a C compiler") from None
        command_line = [sys.executable, "-m", "benchmarks.inference", *sys.argv[1:]]
        done = subprocess.run(command_line, env=os.environ | {_HIDDEN: level, "LD_PRELOAD": str(library)})
    raise SystemExit(done.returncode)


class Ready(NamedTuple):
    """A system that has answered.

    Attributes:
        run: answers token ids.
        facts: size of its file, and closeness to torch in float32.
    """

    run: Run
    facts: dict[str, float]


def _file_size(path: Path) -> int:
    """Bytes of a model: of its directory, or of its file and what lies beside it under the same name."""
    if path.is_dir():
        return sum(each.stat().st_size for each in path.glob("*.safetensors"))
    data = path.with_suffix(".bin")
    return path.stat().st_size + (data.stat().st_size if path.suffix == ".xml" else 0)


def closeness(answer: Any, expected: Tensor) -> float:
    """Signal to noise of an answer in decibels, against that of torch in float32."""
    got = torch.as_tensor(answer).double()
    noise = (got - expected).square().sum().clamp(min=1e-30)
    return round(float(10 * torch.log10(expected.square().sum() / noise)), 1)


def prepare(arguments: argparse.Namespace, models: Models, threads: int) -> dict[str, Ready]:
    """All systems that are wanted and run here."""
    torch.set_num_threads(threads)
    ids = models.ids(1, 128)
    with torch.inference_mode():
        expected = models.theirs()(ids).double()
    ready = {}
    for name, (make, file) in systems(models, threads, arguments.targets, arguments.weight_bits).items():
        if not is_wanted(name, arguments.systems):
            continue
        try:
            run = make()
            answer = run(ids)
        except (ImportError, UserError, RuntimeError) as error:
            print(f"{name} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        facts = {"file_megabytes": round(_file_size(file()) / 1e6, 1)}
        if not name.startswith("transformers"):
            facts["signal_to_noise_db"] = closeness(answer, expected)
        ready[name] = Ready(run, facts)
    gc.collect()
    return ready


def measure(ready: dict[str, Ready], ids: Tensor, rounds: int, budget: float) -> dict[str, Any]:
    """Milliseconds of each system, alternating.

    Args:
        ids: ``[B, S]``.
        rounds: for each system at most.
        budget: seconds for each system; one that needs longer is run once.
    """
    taken: dict[str, list[float]] = {}
    left = {}

    def timed(name: str) -> float:
        return seconds(lambda: ready[name].run(ids), ids.device)

    for name in ready:  # which also gets everybody's memory for this size
        first = timed(name)
        taken[name] = [first] if first > budget else []
        left[name] = 0 if first > budget else min(rounds, max(1, int(budget / first)))
    while any(left.values()):
        for name in [name for name in ready if left[name]]:
            taken[name].append(timed(name))
            left[name] -= 1
    return {
        name: ready[name].facts
        | {"milliseconds": round(1e3 * min(times), 2), "median": round(1e3 * statistics.median(times), 2)}
        for name, times in taken.items()
    }


def draw(report: dict[str, Any], path: Path) -> None:
    """How many times as fast ours is as the fastest peer of each kind: a panel for each instruction set of ours."""
    from matplotlib.figure import Figure

    bars: dict[str, dict[str, dict[str, float]]] = {}
    for key, row in report["rows"].items():
        for name, ratio in row.get("ratios", {}).items():
            bars.setdefault(name, {})[" ".join(key.split()[:4])] = ratio
    widest = max(map(len, bars.values()))
    figure = Figure(figsize=(max(8, 0.55 * widest), 3 * len(bars)), layout="constrained")
    panels = figure.subplots(len(bars), 1, squeeze=False)
    for axes, (name, rows) in zip(panels[:, 0], sorted(bars.items()), strict=True):
        for place, kind in enumerate(KINDS):
            there = [column for column, ratio in enumerate(rows.values()) if kind in ratio]
            heights = [ratio[kind] for ratio in rows.values() if kind in ratio]
            if there:
                places = [column + 0.28 * (place - 1) for column in there]
                axes.bar(places, heights, 0.28, label=f"fastest {kind}", color=f"C{place}")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(rows)), [key.replace(" ", "\n") for key in rows], fontsize=6)
        axes.set_ylabel("times as fast")
        axes.set_title(f"{name}, {report['machine']}", fontsize=9)
        axes.legend(fontsize=7, ncols=3)
    write_picture(path, figure, 110)


def kind_of(name: str) -> str:
    """What a peer computes in: fp32, bf16 or int8 (also where only its products are int8), or nothing of these."""
    return next((kind for kind in reversed(KINDS) if kind in name), "")


def _fastest(times: dict[str, Any], kind: str) -> float:
    """Milliseconds of the fastest peer of a kind."""
    return min((row["milliseconds"] for name, row in times.items() if kind_of(name) == kind), default=float("nan"))


def ratios(times: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times as fast ours is as the fastest peer of each kind that was measured."""
    kinds = [kind for kind in KINDS if any(kind_of(name) == kind for name in times)]
    return {
        name: {kind: round(_fastest(times, kind) / row["milliseconds"], 2) for kind in kinds}
        for name, row in times.items()
        if name.startswith("integer")
    }


def _rows(arguments: argparse.Namespace, models: Models, report: dict[str, Any]) -> None:
    """Measure all rows, and write the report after each."""
    for threads in arguments.threads:
        ready = None if arguments.memory else prepare(arguments, models, threads)
        for batch in arguments.batch:
            for length in arguments.length:
                key = f"{arguments.shape} B{batch} S{length} T{threads}"
                key += f" {arguments.instructions}" if arguments.instructions else ""
                row = report["rows"].setdefault(key, {})
                if ready is None:
                    found = memory(models, batch, length, threads, arguments.systems)
                    row.setdefault("memory", {}).update(found)
                else:
                    times = row.setdefault("times", {})
                    times.update(measure(ready, models.ids(batch, length), arguments.rounds, arguments.seconds))
                    row["ratios"] = ratios(times)
                write_json(arguments.output, report)
                print(json.dumps({key: row}, indent=2), flush=True)


@command("inference")
def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="base")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences")
    parser.add_argument("--length", type=int, nargs="+", default=[128], help="tokens of each")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each system; one that needs longer is run once")
    parser.add_argument("--weight-bits", type=int, nargs="+", choices=(7, 8), default=[8])
    parser.add_argument("--targets", nargs="+", default=["amx"], help="instruction sets of ours")
    parser.add_argument("--instructions", choices=("avx512", "avx2"), help="hide newer ones from all systems")
    parser.add_argument("--systems", nargs="+", default=[], help="only those whose names have one of these parts")
    parser.add_argument("--memory", action="store_true", help="measure memory and the time to the first answer")
    parser.add_argument("--models", type=Path, default=Path("inference-models"), help="folder for models, kept")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/inference_cpu.json"))
    parser.add_argument("--draw", action="store_true", help="only draw the report's PNG")
    arguments = parser.parse_args()
    if arguments.instructions:
        hide_instructions(arguments.instructions)
    models = Models(arguments.models, arguments.shape)
    report = {"rows": {}} | earlier_report(arguments.output)
    if arguments.draw:
        return draw(report, arguments.output.with_suffix(".png"))
    # Rows of other calls stay; threads stand in each.
    made = provenance("inference", *(package for package in PEERS if find_spec(package)))
    report |= {"command": made["command"], "machine": made["machine"], "versions": made["versions"]}
    _rows(arguments, models, report)
    return None


if __name__ == "__main__":
    main()
