# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of converting full-size checkpoints.

    python -m benchmarks.conversion --scratch /tmp --output benchmarks/conversion.json

Generates a 345M checkpoint as NGC packs it (half precision, the torch container of 2020, deflated into a zip file) and
a 3.9B release directory in half precision (7.7 GB), converts each by the command line in a process of its own, and
reports that process's wall-clock time and its largest resident set (mapped files and the interpreter included). Needs
20 GB of disk for the 3.9B model; ``--models 345m`` leaves it out. The weights are random: what they hold does not
matter to either number.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import provenance, publish
from benchmarks.timing import taken_by
from megatron_bert.convert.formats import FORMATS
from megatron_bert.convert.options import WriteOptions
from megatron_bert.convert.state import CanonicalState, SourceFacts, StateTensor, pretraining_tensors
from megatron_bert.model.configuration import MegatronBertConfig

#: Layers, hidden size, heads, vocabulary (the padded one, as it counts as real when no true size is known).
MODELS = {"345m": (24, 1024, 16, 30592), "3.9b": (48, 2560, 40, 30592)}
#: Conversions to time, by model: name and options.
CONVERSIONS: dict[str, list[tuple[str, list[str]]]] = {
    "345m": [
        ("huggingface", ["--to", "huggingface"]),
        ("native", ["--to", "native"]),
        ("megatron 4 x 2", ["--to", "megatron", "--tensor", "4", "--pipeline", "2"]),
    ],
    "3.9b": [
        ("huggingface", ["--to", "huggingface"]),
        ("megatron-core 4 x 2", ["--to", "megatron-core", "--tensor", "4", "--pipeline", "2"]),
        ("native", ["--to", "native"]),
    ],
}


def random_state(model: str) -> CanonicalState:
    """A model of full size whose tensors are drawn when they are asked for."""
    layers, hidden, heads, words = MODELS[model]
    config = MegatronBertConfig(
        vocab_size=words,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        layer_norm_eps=1e-5,
    )
    block = (torch.randn(1 << 20) * 0.02).half()

    def draw(shape: tuple[int, ...]) -> Tensor:
        count = torch.Size(shape).numel()
        return block.repeat(-(-count // len(block)))[:count].view(shape)

    tensors = {
        name: StateTensor(shape, torch.float16, lambda shape=shape: draw(shape), name)  # type: ignore[misc]
        for name, shape in pretraining_tensors(config).items()
    }
    facts = SourceFacts(format="random", variant=model, files=1, stored_rows=words)
    return CanonicalState(config=config, facts=facts, tensors=tensors)


def generate(model: str, folder: Path) -> Path:
    """The source of a model's conversions."""
    state = random_state(model)
    release = folder / "source"
    release.mkdir()
    options = WriteOptions(checkpoint_version=0.0 if model == "345m" else 3.0)
    FORMATS["megatron"].write(state, release, options)
    if model != "345m":
        return release
    shard = release / "release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(shard, weights_only=False)
    torch.save({"model": content["model"]}, shard, _use_new_zipfile_serialization=False)
    archive = folder / "megatron_bert_345m.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.write(shard, "release/mp_rank_00/model_optim_rng.pt")
    shutil.rmtree(release)
    return archive


def measure(source: Path, result: Path, options: list[str]) -> dict[str, Any]:
    """Run one conversion in a process of its own."""
    taken = taken_by("convert", str(source), str(result), *options)
    return {
        "seconds": round(taken.seconds, 1),
        "cpu_seconds": round(taken.processor_seconds, 1),
        "peak_memory_gb": round(taken.peak_bytes / 1e9, 2),
    }


def baseline() -> float:
    """Resident set of a process that imports the converter and does nothing, in GB."""
    code = (
        "import megatron_bert.convert.conversion, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return round(int(done.stdout) * 1024 / 1e9, 2)


def main(arguments: list[str] | None = None) -> int:
    """Generate, convert, measure."""
    parser = argparse.ArgumentParser(description="Time and peak memory of converting full-size checkpoints.")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--scratch", type=Path, help="folder on a disk with room (default: the system's)")
    parser.add_argument("--output", type=Path, metavar="JSON")
    parsed = parser.parse_args(arguments)
    results = []
    for model in parsed.models:
        with tempfile.TemporaryDirectory(dir=parsed.scratch) as folder:
            # In a process of its own, because a process counts the memory of the one that started it as its own.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as generator:
                source = generator.submit(generate, model, Path(folder)).result()
            for name, options in CONVERSIONS[model]:
                result = Path(folder, "result")
                found = {"model": model, "from": source.name, "to": name, **measure(source, result, options)}
                print(found, flush=True)
                results.append(found)
                shutil.rmtree(result)
    report = {
        **provenance("conversion", arguments=arguments),
        "memory_of_the_imports_alone_gb": baseline(),
        "results": results,
    }
    publish(report, parsed.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
