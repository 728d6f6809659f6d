# SPDX-License-Identifier: Apache-2.0
"""Training steps of quantized models beside the float models they come from, and beside transformers' IBert.

All models have the same sizes and read the same batch, in one process; their steps alternate, so that a machine whose
speed drifts does not favor one, and ratios are taken step by step. transformers' IBert with ``quant_mode`` simulates
integers in float32; ours computes them.

    python -m benchmarks.quantized --output benchmarks/quantized_cpu.json
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import provenance, publish, ratios
from benchmarks.peers import transformers
from benchmarks.timing import clock, training_step
from megatron_bert import IBertConfig, IBertForSequenceClassification, MegatronBertConfig
from megatron_bert import MegatronBertForSequenceClassification as MegatronBert
from megatron_bert.ending import command
from megatron_bert.ibert import QuantizationConfig, calibrate, freeze_ranges, quantize_model

#: Shared by all models.
_SIZES = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": 130,
    "num_labels": 2,
}


def _quantized(model: Any, batch: dict[str, Any]) -> Any:
    """A float model, calibrated on the batch, with fixed ranges."""
    model.eval()
    quantize_model(model, QuantizationConfig())
    calibrate(model, [batch], lambda inputs: model(**inputs))
    freeze_ranges(model)
    return model


def make_models(dropout: float, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Models by the name they have in the report."""
    chances = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    pre, post = MegatronBertConfig(**_SIZES, **chances), IBertConfig(**_SIZES, **chances)
    theirs = transformers.IBertForSequenceClassification
    their_config = transformers.IBertConfig(**_SIZES, **chances, type_vocab_size=2)
    simulated = transformers.IBertConfig(**_SIZES, **chances, type_vocab_size=2, quant_mode=True)
    return {
        "pre-layer-norm, float": MegatronBert(pre).to(device),
        "pre-layer-norm, integer": _quantized(MegatronBert(pre).to(device), batch),
        "post-layer-norm, float": IBertForSequenceClassification(post).to(device),
        "post-layer-norm, integer": _quantized(IBertForSequenceClassification(post).to(device), batch),
        "transformers IBert, float": theirs(their_config).to(device),
        "transformers IBert, quant_mode": theirs(simulated).to(device),
    }


def measure(dropout: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each model's step, and its ratio to its float model's."""
    device = torch.device(arguments.device)
    timed = clock(arguments.clock, device)
    torch.manual_seed(0)
    ids = torch.randint(5, _SIZES["vocab_size"], (arguments.batch, arguments.length))
    batch = {"input_ids": ids.to(device), "labels": torch.randint(0, 2, (arguments.batch,)).to(device)}
    models = {name: model.train() for name, model in make_models(dropout, batch, device).items()}
    steps = {
        name: training_step(model.parameters(), lambda model=model: model(**batch).loss, 1e-6)
        for name, model in models.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(arguments.steps + 1):
        for name, step in steps.items():
            duration = timed(step)
            if round_number:  # the first warms up
                taken[name].append(duration)
    names = list(taken)
    results = {}
    for base, name in zip(names[::2], names[1::2], strict=True):
        results[name] = {
            "float_seconds": round(statistics.median(taken[base]), 4),
            "seconds": round(statistics.median(taken[name]), 4),
            "ratio": {key: round(ratio, 3) for key, ratio in ratios(taken[name], taken[base]).items()},
        }
    return results


@command("benchmarks.quantized")
def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--batch", type=int, default=32, help="sequences")
    parser.add_argument("--length", type=int, default=64, help="tokens of each")
    parser.add_argument("--steps", type=int, default=9, help="measured steps of each model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="processor leaves waiting out")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/quantized_cpu.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = {
        **provenance("quantized", "transformers", device=torch.device(arguments.device)),
        "clock": arguments.clock,
        "sizes": _SIZES,
        "batch": {"sequences": arguments.batch, "length": arguments.length},
        "steps": arguments.steps,
        "dropout 0": measure(0.0, arguments),
        "dropout 0.1": measure(0.1, arguments),
    }
    publish(report, arguments.output)


if __name__ == "__main__":
    main()
