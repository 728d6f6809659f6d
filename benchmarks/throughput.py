# SPDX-License-Identifier: Apache-2.0
"""Training throughput beside transformers' MegatronBertForPreTraining, in pairs in one process.

Both train on the same batch (same sequences, masked positions and labels) in float32 with dropout 0.1 and fused AdamW.
Their steps alternate, and the ratio is taken pair by pair, so that a machine whose speed drifts does not favor one.

    python -m benchmarks.throughput --output benchmarks/throughput_cpu.json
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import provenance, publish, ratios
from benchmarks.our_trainer import make_batch, mean_loss
from benchmarks.peers import their_model
from benchmarks.timing import seconds, training_step
from megatron_bert.ending import command
from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.pretraining import BertForPretraining
from parallel.cross_entropy import IGNORED
from parallel.sharding import initialize


def our_step(
    config: MegatronBertConfig, batch: MicroBatch, device: torch.device, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """One training step of this project's model."""
    model = BertForPretraining(config, device=device)
    initialize(model, 0)
    batch = batch.to(device)

    def loss() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return mean_loss(model, batch)

    return training_step(model.parameters(), loss, 1e-4)


def their_inputs(batch: MicroBatch, device: torch.device) -> dict[str, Tensor]:
    """A micro batch as the arguments of transformers' model."""
    rows, length = batch.layout.batch, batch.layout.length
    labels = torch.full((rows * length,), IGNORED)
    labels[batch.slots] = batch.slot_labels
    given = {
        "input_ids": batch.tokens.view(rows, length),
        "token_type_ids": batch.types.view(rows, length),
        "labels": labels.view(rows, length),
        "next_sentence_label": batch.pair_labels,
    }
    return {name: tensor.to(device) for name, tensor in given.items()}


def their_step(
    config: MegatronBertConfig, batch: MicroBatch, device: torch.device, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """The same step of transformers' model."""
    model = their_model(config).to(device).train()
    inputs = their_inputs(batch, device)

    def loss() -> Any:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(**inputs).loss

    return training_step(model.parameters(), loss, 1e-4)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time both in turn."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = MegatronBertConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        intermediate_size=4 * arguments.hidden,
        max_position_embeddings=arguments.length,
        layer_norm_eps=1e-5,
    )
    batch = make_batch(config, arguments.batch, arguments.length)
    ours = our_step(config, batch, device, dtype)
    theirs = their_step(config, batch, device, dtype)
    for _ in range(arguments.warmup):
        ours(), theirs()
    pairs = [(seconds(ours, device), seconds(theirs, device)) for _ in range(arguments.pairs)]
    ours_took, theirs_took = zip(*pairs, strict=True)
    tokens = arguments.batch * arguments.length
    return {
        **provenance("throughput", "transformers", device=device),
        "model": {
            "layers": arguments.layers,
            "hidden": arguments.hidden,
            "heads": arguments.heads,
            "vocab": arguments.vocab_size,
        },
        "batch": {"sequences": arguments.batch, "tokens_each": arguments.length, "masked": batch.slots.shape[0]},
        "dtype": arguments.dtype,
        "pairs": arguments.pairs,
        "tokens_per_second": {
            "megatron_bert": tokens / statistics.median(ours_took),
            "transformers": tokens / statistics.median(theirs_took),
        },
        "ratio": ratios(theirs_took, ours_took),
    }


@command("benchmarks.throughput")
def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=30522)
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--warmup", type=int, default=2, help="pairs not counted")
    parser.add_argument("--pairs", type=int, default=15, help="pairs counted")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    publish(measure(arguments), arguments.output)


if __name__ == "__main__":
    main()
