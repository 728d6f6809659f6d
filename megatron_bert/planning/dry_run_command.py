# SPDX-License-Identifier: Apache-2.0
"""``megatron-bert pretrain --dry-run``: check a run, and measure a step of it, before it is queued."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

from megatron_bert.config import Settings
from megatron_bert.config_checks import check_settings
from megatron_bert.config_file import load_settings
from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.planning.communication import step_messages, totals
from megatron_bert.planning.devices import GIB, NETWORK, load_device
from megatron_bert.planning.dry_run import dry_run_rank
from megatron_bert.planning.layouts import stages_of
from megatron_bert.planning.measuring import StepMeasurement
from megatron_bert.planning.memory import layout_of, rank_memory
from megatron_bert.planning.needs import checkpoint_lines, data_lines
from megatron_bert.planning.search import usable_bytes
from megatron_bert.planning.step_time import Machine
from megatron_bert.planning.work import rank_flops
from megatron_bert.planning.workload import USUAL_VOCABULARY, Workload, workload_of
from megatron_bert.training.pretrain import check_inputs, take_sizes
from megatron_bert.training.pretraining import Pretraining
from megatron_bert.training.run import find_start
from parallel.errors import UserError
from parallel.process_group import launched_world_size


def run_dry_run(arguments: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UserError: whatever a start of the run would refuse; or a rank needs more memory than the device has.
    """
    settings = take_sizes(load_settings(arguments.config, arguments.overrides))
    ranks = launched_world_size() if arguments.gpus is None else arguments.gpus
    if ranks < 1:
        raise UserError(f"--gpus is {ranks}: give 1 or more")
    machine = None if arguments.gpu is None else Machine(load_device(arguments.gpu), NETWORK)
    layout = check_settings(settings, ranks)
    tokenizer = check_inputs(settings)
    start = find_start(settings, Pretraining(settings, tokenizer)).checkpoint
    print(
        f"settings, tokenizer and data are good for {ranks} processes; it would start from {start or 'the beginning'}"
    )
    if layout.world_size < ranks:
        print(f"{ranks - layout.world_size} of them would wait as spares")
    workload = _workload(settings, tokenizer.vocab_size, tokenizer.pad_id)
    chosen = _chosen(settings, layout.world_size, arguments.rank)
    for rank in chosen:
        step = dry_run_rank(settings, lambda own: Pretraining(own, tokenizer), rank, layout.world_size)
        print("\n".join(report(settings, workload, rank, layout.world_size, step)))
        needed = max(step.peak_bytes, step.building)
        if machine is not None and needed > usable_bytes(machine):
            raise UserError(
                f"rank {rank} needs {needed / GIB:.1f} GiB, and of {machine.device.name} "
                f"{usable_bytes(machine) / GIB:.1f} are usable: see `megatron-bert plan` for layouts that fit"
            )
    print("\n".join(data_lines(settings, workload)))
    print("\n".join(checkpoint_lines(settings, workload, layout_of(settings, layout.world_size), disk=2.0)))


def measure_unseen(config: Path, overrides: list[str], world_size: int) -> list[str]:
    """A line for each rank that takes most memory, of a run whose files need not be here.

    Args:
        config: settings file.
        overrides: of settings.
        world_size: ranks of the run.

    Raises:
        UserError: the trainer refuses the settings.
    """
    settings = load_settings(config, overrides)
    words = cast(Tokenizer, _UnseenVocabulary())
    lines = []
    for rank in _chosen(settings, world_size, None):
        step = dry_run_rank(settings, lambda own: Pretraining(own, words), rank, world_size)
        sent = sum(seen.bytes for seen in step.traffic.values())
        lines.append(
            f"dry run: rank {rank} of {world_size} takes {step.peak_bytes / GIB:.1f} GiB at its peak, "
            f"{step.flops / 1e12:,.1f} TFLOP and {sent / 1e9:,.2f} GB of messages per step"
        )
    return lines


class _UnseenVocabulary(NamedTuple):
    """What a run asks of its vocabulary before its first sample, of the usual one."""

    vocab_size: int = USUAL_VOCABULARY
    pad_id: int = 0
    fingerprint: str = ""


def _workload(settings: Settings, words: int, padding: int) -> Workload:
    config = settings.model_config_for(words, padding)
    return workload_of(settings, config, settings.training.steps, settings.data.seq_length)


def _chosen(settings: Settings, world_size: int, ranks: Sequence[int] | None) -> list[int]:
    """Those asked for; or the first of the first and of the last pipeline stage, one of which takes most."""
    if ranks is None:
        pipeline = settings.layout(world_size).pipeline
        return sorted({0, (pipeline - 1) * (world_size // pipeline)})
    for rank in ranks:
        if not 0 <= rank < world_size:
            raise UserError(f"--rank is {rank}: give 0 to {world_size - 1}")
    return list(ranks)


def report(settings: Settings, workload: Workload, rank: int, world_size: int, step: StepMeasurement) -> list[str]:
    """What a step of one rank took, beside what the closed forms say."""
    layout = layout_of(settings, world_size)
    stages = stages_of(workload, layout, settings.parallel.stage_layers)
    place, in_stage = divmod(rank, world_size // layout.pipeline)
    predicted = rank_memory(workload, layout, stages, place).peak
    parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in sorted(step.peak.items(), key=lambda item: -item[1]))
    lines = [
        f"rank {rank} of {world_size}: {step.peak_bytes / GIB:.2f} GiB at its peak ({parts}); "
        f"{predicted / GIB:.2f} by closed form",
        f"  between steps {sum(step.resident.values()) / GIB:.2f} GiB, {step.building / GIB:.2f} while it is built; "
        f"{step.flops / 1e12:,.2f} TFLOP a step, "
        f"{rank_flops(workload, layout, stages, place) / 1e12:,.2f} by closed form",
    ]
    closed = totals(step_messages(workload, layout, stages, place, in_stage // layout.tensor))
    for what, seen in sorted(step.traffic.items()):
        expected = closed.get((what.kind, what.group, what.dtype, what.size))
        same = "" if expected == (seen.count, seen.bytes) else f", {expected} by closed form"
        among = f"{what.size} ({what.group.replace('_', ' ')})"
        size = f"{seen.bytes / 1e6:,.3f} MB in {what.dtype} in all"
        lines.append(f"  {what.kind} over {among}: {seen.count:,} of {size}{same}")
    return lines
