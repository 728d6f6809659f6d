# SPDX-License-Identifier: Apache-2.0
"""What data parallelism costs the processor on one rank: flat buffers, FSDP2, and plain modules under torch's AdamW.

All train the same model in bfloat16 on the same micro batches: forward and backward passes, the gradient's norm,
clipping, the update, and gradients dropped. The plain side has bfloat16 weights, gradients and moments; the others
have float32 master weights, gradients and moments, as runs have. They alternate in one process, and times are those of
the processor, since a GPU waits for it and other programs may run beside it.

    python -m benchmarks.data_parallel --output benchmarks/data_parallel_cpu.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks.harness import provenance, publish
from benchmarks.kernels import Outside
from benchmarks.our_trainer import make_batch, mean_loss
from benchmarks.timing import processor_seconds
from megatron_bert.config_sections import OptimizerSettings
from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.pretraining import BertForPretraining
from megatron_bert.model.sequences import SequenceLayout
from megatron_bert.training.optimizer import ShardedOptimizer, decays
from parallel.data_parallel import apply_data_parallel, finish_gradients, set_gradient_sync
from parallel.gradients import clip_factor, global_gradient_norm
from parallel.mesh import ParallelLayout, ParallelMesh
from parallel.process_group import process_group
from parallel.sharding import initialize

Step = Callable[[], None]

RATE, CLIP = 1e-4, 1.0
SETTINGS = OptimizerSettings()
LENGTH, SEQUENCES = 16, 2
#: Layers that FSDP2 gathers at a time, which is what this project did before it had flat buffers.
FSDP_GROUP = 3


def config_of(layers: int, hidden: int) -> MegatronBertConfig:
    """A model of small matrices with as many parameters, in number, as a large one."""
    return MegatronBertConfig(
        vocab_size=1000,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=4 * hidden,
        max_position_embeddings=LENGTH,
    )


def make_batches(config: MegatronBertConfig, count: int) -> list[MicroBatch]:
    """Micro batches of short sequences."""
    every = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    layout = SequenceLayout.rectangle(SEQUENCES, LENGTH, every)
    return [replace(make_batch(config, SEQUENCES, LENGTH, seed), layout=layout) for seed in range(count)]


def by_torch(
    model: BertForPretraining, batches: list[MicroBatch], before: Callable[[bool], None]
) -> Callable[[], None]:
    """A step of modules that hold their own parameters, under torch's fused AdamW."""
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if decays(name, p.dim()) == decayed],
            "weight_decay": decay,
        }
        for decayed, decay in ((True, SETTINGS.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)

    def step() -> None:
        for number, batch in enumerate(batches):
            before(number == len(batches) - 1)
            mean_loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain(model: BertForPretraining, batches: list[MicroBatch], mesh: ParallelMesh) -> Step:  # noqa: ARG001
    """A step of plain modules."""
    return by_torch(model.bfloat16(), batches, lambda last: None)  # noqa: ARG005


def fsdp2(model: BertForPretraining, batches: list[MicroBatch], mesh: ParallelMesh) -> Step:
    """A step under FSDP2, whose parameters stay gathered between micro batches."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers = model.encoder.layer_list()
    for first in range(0, len(layers), FSDP_GROUP):
        fully_shard(
            list(layers[first : first + FSDP_GROUP]),
            mesh=mesh.data_mesh(),
            mp_policy=policy,
            reshard_after_forward=False,
        )
    wrapped: Any = fully_shard(model, mesh=mesh.data_mesh(), mp_policy=policy, reshard_after_forward=False)

    def before(last: bool) -> None:
        wrapped.set_requires_gradient_sync(last)
        wrapped.set_is_last_backward(last)
        wrapped.set_reshard_after_backward(last)

    return by_torch(model, batches, before)


def flat(model: BertForPretraining, batches: list[MicroBatch], mesh: ParallelMesh) -> Step:
    """A step on flat buffers, as the trainer takes it."""
    layers = model.encoder.layer_list()
    apply_data_parallel(model, layers, mesh, sharding="none", compute_dtype=torch.bfloat16)
    optimizer = ShardedOptimizer(dict(model.named_parameters()), SETTINGS, mesh, stages=[model])

    def step() -> None:
        for number, batch in enumerate(batches):
            set_gradient_sync(model, last=number == len(batches) - 1)
            mean_loss(model, batch).backward()
        finish_gradients(model)
        norm = global_gradient_norm(optimizer.gradients(mesh), mesh)
        optimizer.step(RATE, (~norm.isfinite()).float(), clip_factor(norm, CLIP))
        optimizer.zero_grad()

    return step


KINDS = {"plain modules": plain, "FSDP2": fsdp2, "flat buffers": flat}


def compare(layers: int, hidden: int, microbatches: int, rounds: int) -> dict[str, Any]:
    """Time steps of each kind in turn.

    Returns:
        Of each kind, milliseconds of a step and operators that are not views; medians of the ratios to plain modules
        in the same round.
    """
    config, steps = config_of(layers, hidden), {}
    batches = make_batches(config, microbatches)
    mesh = ParallelMesh(ParallelLayout(), torch.device("cpu"))
    for name, kind in KINDS.items():
        model = BertForPretraining(config)
        initialize(model, 1)
        steps[name] = kind(model, batches, mesh)
    operators = {}
    for name, step in steps.items():
        step()
        step()
        with Outside() as seen:
            step()
        operators[name] = seen.outside.total()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(1000 * processor_seconds(step))
    baseline = times["plain modules"]
    return {
        name: {
            "milliseconds": round(statistics.median(found), 2),
            "to_plain": round(statistics.median(a / b for a, b in zip(found, baseline)), 3),
            "operators": operators[name],
        }
        for name, found in times.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with process_group("cpu"):
        found = compare(given.layers, given.hidden, given.micro_batches, given.rounds)
    for name, row in found.items():
        print(f"{name:14} {row['milliseconds']:8.2f} ms  {row['to_plain']:.3f} x plain  {row['operators']} operators")
    settings = {name: getattr(given, name) for name in ("layers", "hidden", "micro_batches", "rounds")}
    publish({**provenance("data_parallel", arguments=arguments), **settings, "found": found}, given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
