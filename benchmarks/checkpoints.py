# SPDX-License-Identifier: Apache-2.0
"""What checkpoints cost a step: saves of this project and of torch.distributed.checkpoint, in turns in one process.

    python -m benchmarks.checkpoints --size tiny --output benchmarks/checkpoints_tiny.json

The state is that of a BERT of a size: weights and two moments in float32, on one rank and the CPU. A step is a fixed
number of matrix products and one pass over the weights. For each kind of save the script reports the seconds that the
call holds the step, the seconds of steps while the data is being written, as a ratio to steps without, and the seconds
until the checkpoint is there.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from benchmarks.harness import provenance, publish
from megatron_bert.ending import command
from parallel.checkpoint_writer import CheckpointWriter
from parallel.process_group import process_group

#: Name -> layers, hidden size and words.
SIZES = {"tiny": (2, 64, 1024), "base": (12, 768, 30592), "345m": (24, 1024, 30592)}


def state_of(size: str) -> dict[str, Tensor]:
    """Tensors of a size by name: the shapes of a BERT's weights, and of its two moments."""
    layers, hidden, words = SIZES[size]
    shapes: dict[str, tuple[int, ...]] = {"words": (words, hidden), "positions": (512, hidden)}
    for layer in range(layers):
        for name, rows, columns in (
            ("query_key_value", 3 * hidden, hidden),
            ("attention_output", hidden, hidden),
            ("up", 4 * hidden, hidden),
            ("down", hidden, 4 * hidden),
        ):
            shapes[f"layers.{layer}.{name}.weight"] = (rows, columns)
            shapes[f"layers.{layer}.{name}.bias"] = (rows,)
        for name in ("first_norm", "second_norm"):
            shapes |= {f"layers.{layer}.{name}.{part}": (hidden,) for part in ("weight", "bias")}
    kinds = ("model", "optimizer.first", "optimizer.second")
    return {f"{kind}.{name}": torch.randn(shape) for kind in kinds for name, shape in shapes.items()}


class Steps:
    """Work like that of a training step, on the CPU.

    Args:
        seconds: about how long one takes.
    """

    def __init__(self, seconds: float) -> None:
        self.matrix = torch.randn(256, 256)
        began = time.perf_counter()
        for _ in range(20):
            self.matrix @ self.matrix
        self.products = max(1, round(20 * seconds / (time.perf_counter() - began)))

    def run(self) -> float:
        """One step; its seconds."""
        began = time.perf_counter()
        for _ in range(self.products):
            self.matrix @ self.matrix
        return time.perf_counter() - began


class Save(NamedTuple):
    """One that is being written.

    Attributes:
        copied: returns when the tensors may change.
        done: whether all is written.
    """

    copied: Callable[[], None]
    done: Callable[[], bool]


def measure(save: Callable[[int], Save], steps: Steps, saves: int) -> dict[str, Any]:
    """Save a number of times while steps are running, the first of which changes the tensors at its end.

    Args:
        save: starts the save of a step.
        saves: how many, and one more at first, which is reported on its own.
    """
    stalls, totals, ratios = [], [], []
    for number in range(saves + 1):
        before = [steps.run() for _ in range(5)]
        began = time.perf_counter()
        one = save(number)
        stall = time.perf_counter() - began
        during = [steps.run()]
        reached = time.perf_counter()
        one.copied()
        stalls.append(stall + time.perf_counter() - reached)
        while not one.done():
            during.append(steps.run())
        totals.append(time.perf_counter() - began)
        # A save takes in all what it holds back, and what each step takes longer while it is being written.
        ratios.append(statistics.mean(during) / statistics.median(before))
    return {
        "first_stall_seconds": round(stalls[0], 4),
        "stall_seconds": round(statistics.median(stalls[1:]), 4),
        "seconds": round(statistics.median(totals[1:]), 3),
        "step_ratio_while_writing": round(statistics.median(ratios[1:]), 3),
    }


def ours(root: Path, tensors: dict[str, Tensor]) -> Callable[[int], Save]:
    """Saves by this project's writer."""
    writer = CheckpointWriter(root, keep=1, asynchronous=True)

    def save(number: int) -> Save:
        writer.save(number + 1, tensors, {"step": number}, frozen=True)
        return Save(writer.copied, lambda: bool(writer.saved()))

    return save


def torchs(root: Path, tensors: dict[str, Tensor]) -> Callable[[int], Save]:
    """Saves by ``torch.distributed.checkpoint.async_save`` in a thread, the older ones removed."""

    def save(number: int) -> Save:
        shutil.rmtree(root / f"{number - 1}", ignore_errors=True)
        pending = dcp.async_save(tensors, storage_writer=dcp.FileSystemWriter(root / f"{number}"))
        assert isinstance(pending, Future)
        return Save(lambda: None, pending.done)

    return save


@command("benchmarks.checkpoints")
def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--step-seconds", type=float, default=0.05, help="of the work that saves are to leave alone")
    parser.add_argument("--saves", type=int, default=3, help="measured of each kind, after a first one")
    parser.add_argument("--rounds", type=int, default=2, help="how often the kinds take turns")
    parser.add_argument("--directory", type=Path, default=Path("benchmark_checkpoints.partial"), help="removed after")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results: dict[str, list[dict[str, Any]]] = {"this project": [], "torch in a thread": []}
    try:
        with process_group("cpu"):
            tensors, steps = state_of(options.size), Steps(options.step_seconds)
            size = sum(tensor.nbytes for tensor in tensors.values())
            for number in range(options.rounds):
                for (kind, found), start in zip(results.items(), (ours, torchs)):
                    root = options.directory / f"{kind.split()[0]}{number}"
                    found.append(measure(start(root, tensors), steps, options.saves))
                    shutil.rmtree(root)
                    print(kind, found[-1], flush=True)
    finally:
        shutil.rmtree(options.directory, ignore_errors=True)
    report = {
        **provenance("checkpoints", arguments=arguments),
        "size": options.size,
        "tensors": len(tensors),
        "bytes": size,
        "step_seconds": options.step_seconds,
        "results": results,
    }
    publish(report, options.output)


if __name__ == "__main__":
    raise SystemExit(main())
