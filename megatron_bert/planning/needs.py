# SPDX-License-Identifier: Apache-2.0
"""What a run needs beside its devices: data, room for checkpoints, memory of hosts."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_bert.config import RunSettings, Settings
from megatron_bert.data.indexed import IndexedDataset
from megatron_bert.data.sample_index import split_documents
from megatron_bert.planning.checkpoints import CheckpointPlan, SavedTensor, plan_checkpoint
from megatron_bert.planning.devices import GIB
from megatron_bert.planning.layouts import Layout, Stage
from megatron_bert.planning.units import DECIMAL_BYTES, short, with_unit
from megatron_bert.planning.workload import Workload
from parallel.errors import counted
from parallel.pipeline.schedules import SCHEDULES

#: Passes through a text up to which repeated text is about as good as new (Muennighoff et al., arXiv 2305.16264).
FEW_EPOCHS = 4.0
#: Memory of a rank, and of the process that its loaders are forked from: an interpreter and its libraries.
PROCESS_GIB = 0.35
#: Memory that a loader process adds, without the files that it maps.
LOADER_GIB = 0.1
#: Documents of a corpus so large that rounding their number does not change a split.
_FINE = 2**40


def data_lines(settings: RunSettings, workload: Workload) -> list[str]:
    """Tokens that the steps take, epochs of the corpora that are there, and a warning at more than a few."""
    each = workload.global_batch * workload.sample_tokens
    steps = workload.steps
    whole_run = "" if steps is None else f", {each * steps:,} in {counted(steps, 'step')}"
    lines = [f"data: {each:,} tokens per step{whole_run}, if none is padding"]
    if steps is None or not isinstance(settings, Settings):
        return lines
    used = split_documents(settings.data.split, _FINE)[0][1] / _FINE
    whole = sum(corpus.weight for corpus in settings.data.train)
    for corpus in settings.data.train:
        if not Path(f"{corpus.prefix}.idx").exists():
            lines.append(f"  {corpus.prefix} is not there, so its epochs are not known")
            continue
        tokens = int(IndexedDataset(corpus.prefix).sizes.sum()) * (used if settings.data.valid is None else 1.0)
        epochs = each * steps * corpus.weight / whole / max(tokens, 1.0)
        lines.append(f"  {corpus.prefix}: {tokens:,.0f} tokens to train on, {epochs:,.1f} epochs")
        if epochs > FEW_EPOCHS:
            lines.append(
                f"  warning: {epochs:,.0f} epochs are more than the {FEW_EPOCHS:.0f} up to which repeated text is "
                "about as good as new: get more text, or take fewer steps"
            )
    return lines


def checkpoint_of(layout: Layout, stages: list[Stage]) -> CheckpointPlan:
    """The checkpoint of a layout: weights and two moments in float32, each value once."""
    placement = SCHEDULES[layout.schedule].placement
    tensors = [
        SavedTensor(
            nbytes=4 * math.prod(parameter.shape),
            shards=(layout.tensor if parameter.divided is not None else 1) * layout.shards,
            stage=placement.rank(stage.number, layout.pipeline),
        )
        for stage in stages
        for parameter in stage.parameters
        if not (stage.alone and stage.number and parameter is stage.parameters.root[0])
        for _ in range(3)
    ]
    return plan_checkpoint(tensors, layout.world_size, layout.pipeline)


def checkpoint_lines(settings: RunSettings, plan: CheckpointPlan, disk: float) -> list[str]:
    """Size of a checkpoint, how long it takes to write, and room for those that are kept.

    Args:
        plan: of the checkpoint.
        disk: gigabytes a second that the file system takes from all ranks together.
    """
    size, keep = plan.value_bytes + plan.metadata_bytes, settings.checkpoint.keep
    kept = (
        f"; {keep} kept and one being written: {with_unit((keep + 1) * size, DECIMAL_BYTES)}"
        if keep
        else "; all are kept"
    )
    return [
        f"checkpoints: {with_unit(size, DECIMAL_BYTES)} in {counted(plan.files, 'file')}, {short(size / 1e9 / disk)} s "
        f"at {disk:g} GB/s; a rank writes {with_unit(plan.rank_bytes, DECIMAL_BYTES, 2)} at most{kept}"
    ]


def host_lines(
    settings: RunSettings, workload: Workload, layout: Layout, checkpoint: CheckpointPlan, ranks: int
) -> list[str]:
    """Memory that loaders and the copies of checkpoints take on a host, which has so many ranks."""
    if not isinstance(settings, Settings):
        return []
    workers = settings.data.workers
    # Tokens, positions, types and samples of eight bytes each; two steps are loaded ahead.
    batches = 2 * layout.microbatches(workload) * layout.micro_batch * workload.sample_tokens * 32
    staged = checkpoint.rank_bytes if settings.checkpoint.asynchronous else 0
    loaders = (PROCESS_GIB + workers * LOADER_GIB if workers else 0.0) + batches / GIB
    return [
        f"host memory: {ranks * (loaders + PROCESS_GIB + staged / GIB):,.1f} GiB per node of {counted(ranks, 'rank')}: "
        f"{ranks * loaders:,.1f} of {counted(workers, 'loader')} per rank, {ranks * staged / GIB:,.1f} of copies of "
        "checkpoints, the rest of the ranks themselves"
    ]
