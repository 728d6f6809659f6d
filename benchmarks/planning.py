# SPDX-License-Identifier: Apache-2.0
"""Predicted step times beside measured ones, of small runs on this machine's processor.

A world is calibrated (`megatron-bert bench --ranks N`) before and after it trains, for a machine is not always equally
fast; its steps are predicted with both, and the mean is compared with what was measured in between. The error is the
median of several rounds.

    python -m benchmarks.planning --output benchmarks/planning_cpu.json

Rows of other calls stay in the file: `--ranks 4 --only sharding` measures one of them again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import earlier_report, provenance, publish
from benchmarks.timing import taken_by
from megatron_bert.config_file import load_settings
from megatron_bert.data.preprocess import preprocess
from megatron_bert.ending import command
from megatron_bert.planning.bench import bench
from megatron_bert.planning.devices import GIB, NETWORK
from megatron_bert.planning.machine import Machine
from megatron_bert.planning.memory import layout_of
from megatron_bert.planning.search import predict
from megatron_bert.planning.this_machine import run_ranks
from megatron_bert.planning.workload import workload_of
from megatron_bert.training.metrics_file import METRICS_FILE, read_metrics
from megatron_bert.training.pretrain import pretrain

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "bert_345m.yaml"
#: Ranks, and settings of their layouts.
WORLDS: dict[int, list[list[str]]] = {
    1: [["parallel.tensor=1"]],
    2: [
        ["parallel.tensor=1"],
        ["parallel.tensor=2"],
        ["parallel.pipeline=2"],
        ["parallel.tensor=2", "parallel.sequence=true"],
        ["parallel.sharding=full"],
    ],
    4: [
        ["parallel.tensor=2", "parallel.sequence=true"],
        ["parallel.tensor=1"],
        ["parallel.pipeline=2"],
        ["parallel.tensor=4"],
        ["parallel.sharding=full"],
    ],
}
SIZES = [
    "model.hidden_size=256",
    "model.num_hidden_layers=4",
    "model.num_attention_heads=4",
    "model.max_position_embeddings=128",
    "data.seq_length=128",
    "data.packed=false",
    "data.workers=0",
    "data.split=1,0,0",
    "data.pair_objective=none",
    "data.short_sequence_probability=0.0",
    "precision.compute=float32",
    "training.compile=false",
    "training.device=cpu",
    "training.global_batch_size=16",
    "training.micro_batch_size=4",
    "logging.every=3",
    "logging.tensorboard=false",
    "checkpoint.every=0",
]


def make_corpus(folder: Path, words: int = 2000) -> list[str]:
    """Overrides that name a corpus of made-up documents, long enough to fill samples."""
    names = [f"w{number}" for number in range(words)]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *names]), encoding="utf-8")
    sentences = [" ".join(names[(i * k) % words] for k in range(1, 13)) + " ." for i in range(1, 1000)]
    text = folder / "text.txt"
    documents = ["\n".join(sentences[(7 * d + s) % len(sentences)] for s in range(60)) for d in range(40)]
    text.write_text("\n\n".join(documents), encoding="utf-8")
    report = preprocess([text], vocabulary, folder / "corpus", lowercase=True, progress=False)
    return [f"tokenizer.path={vocabulary}", "tokenizer.lowercase=true", f"data.train={report.prefix}"]


def _train(rank: int, overrides: list[str]) -> None:  # noqa: ARG001
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    pretrain(load_settings(CONFIG, overrides))


def measured_seconds(overrides: list[str], ranks: int, folder: Path) -> float:
    """Median seconds of a step, the first ones left out."""
    run_ranks(ranks, _train, [*overrides, f"training.run_dir={folder}"])
    rows = [row["step_seconds"] for row in read_metrics(folder / METRICS_FILE) if "step_seconds" in row]
    return statistics.median(rows[1:])


def _machine(ranks: int) -> Machine:
    """This one as it is measured now; a single rank sends nothing."""
    device, link = bench(ranks, "cpu")
    return Machine(device, link or NETWORK)


def compare(ranks: int, worlds: list[list[str]], steps: int, rounds: int) -> list[dict[str, Any]]:
    """Predictions and measurements of layouts, one after the other, each between two calibrations."""
    found: dict[int, list[tuple[float, float]]] = {number: [] for number in range(len(worlds))}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [*SIZES, *make_corpus(folder), f"training.steps={steps}", "learning_rate.warmup_steps=1"]
        before = _machine(ranks)
        for turn, (number, chosen) in itertools.product(range(rounds), enumerate(worlds)):
            settings = load_settings(CONFIG, [*overrides, *chosen])
            seen = measured_seconds([*overrides, *chosen], ranks, folder / f"{turn} {number}")
            after = _machine(ranks)
            work = workload_of(settings, settings.model_config_for(2006, 0), steps, settings.data.seq_length)
            ours = [predict(work, layout_of(settings, ranks), machine).time.seconds for machine in (before, after)]
            found[number].append((statistics.fmean(ours), seen))
            before = after
    return [_row(ranks, chosen, found[number]) for number, chosen in enumerate(worlds)]


def _row(ranks: int, chosen: list[str], seconds: list[tuple[float, float]]) -> dict[str, Any]:
    errors = [ours / seen - 1 for ours, seen in seconds]
    return {
        "ranks": ranks,
        "settings": chosen,
        "predicted_seconds": statistics.median(ours for ours, _ in seconds),
        "measured_seconds": statistics.median(seen for _, seen in seconds),
        "error": statistics.median(errors),
        "errors": errors,
    }


def of_3_9b(gpus: int) -> list[dict[str, Any]]:
    """Seconds and memory of the commands that plan the largest model and dry-run it, which start no other process."""
    config = str(CONFIG.parent / "bert_3.9b.yaml")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        corpus = make_corpus(Path(name), words=30516)
        own = ["training.micro_batch_size=4", f"training.run_dir={name}/run"]  # 256 data ranks of 1,024 rows
        for given in (["plan", config], ["pretrain", config, *corpus, *own, "--dry-run"]):
            taken = taken_by(*given, "--gpus", str(gpus), "--gpu", "h100")
            rows.append(
                {
                    "command": given[0] if given[-1] == config else f"{given[0]} {given[-1]}",
                    "gpus": gpus,
                    "seconds": taken.seconds,
                    "processor_seconds": taken.processor_seconds,
                    "peak_gib": taken.peak_bytes / GIB,
                }
            )
    return rows


def _merged(before: list[dict[str, Any]], found: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """Rows of an earlier report, those that were found again in their places, and new ones behind them."""
    rows = {json.dumps([row[name] for name in names]): row for row in (*before, *found)}
    return list(rows.values())


@command("benchmarks.planning")
def main() -> None:
    """Predict, measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3, help="predictions and runs of each layout, in turns")
    parser.add_argument("--only", nargs="+", default=[""], help="layouts with one of these in their settings")
    parser.add_argument("--gpus", type=int, nargs="*", default=[512], help="devices to plan 3.9B for")
    parser.add_argument("--output", type=Path, help="JSON file to write; its rows of other layouts stay")
    arguments = parser.parse_args()
    result = provenance("planning")
    worlds, of_largest = [], []
    for ranks in arguments.ranks:
        chosen = [world for world in WORLDS[ranks] if any(part in " ".join(world) for part in arguments.only)]
        rows = compare(ranks, chosen, arguments.steps, arguments.rounds) if chosen else []
        worlds += [{"command": result["command"]} | row for row in rows]
    for gpus in arguments.gpus:
        of_largest += of_3_9b(gpus)
    output: Path | None = arguments.output
    earlier = earlier_report(output)
    before = [{"command": earlier["command"]} | row for row in earlier.get("worlds", [])]
    result["worlds"] = _merged(before, worlds, "ranks", "settings")
    result["of_3.9b"] = _merged(earlier.get("of_3.9b", []), of_largest, "gpus", "command")
    publish(result, output)


if __name__ == "__main__":
    main()
