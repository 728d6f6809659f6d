# SPDX-License-Identifier: Apache-2.0
"""``--dry-run`` of pretrain, finetune and quantize: check a run, and measure a step of it, before it is queued."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from megatron_bert.config import RunSettings
from megatron_bert.config_checks import check_layout, check_settings
from megatron_bert.config_file import load_sections, load_settings
from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.finetuning.finetune import FinetuneProcedure, checked_runs, seed_variants
from megatron_bert.finetuning.objective import Finetuning
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.model.batch import TokenBatch
from megatron_bert.planning.communication import step_messages, totals
from megatron_bert.planning.devices import NETWORK, load_device
from megatron_bert.planning.dry_run import dry_run_rank, longest_batch, longest_task_batch
from megatron_bert.planning.fullest import fullest
from megatron_bert.planning.layouts import Layout, Stage, stages_of
from megatron_bert.planning.machine import Machine
from megatron_bert.planning.measuring import StepMeasurement
from megatron_bert.planning.memory import layout_of, rank_memory
from megatron_bert.planning.needs import checkpoint_lines, checkpoint_of, data_lines
from megatron_bert.planning.search import usable_bytes
from megatron_bert.planning.units import DECIMAL_BYTES, OPERATIONS, parts_of, unit_of, with_unit
from megatron_bert.planning.work import rank_flops
from megatron_bert.planning.workload import USUAL_VOCABULARY, TaskHead, Workload, workload_of
from megatron_bert.quantizing.quantize import QuantizeProcedure, quantize_variants
from megatron_bert.quantizing.settings import QuantizeSettings, check_quantize
from megatron_bert.training.objective import Objective
from megatron_bert.training.pretrain import check_inputs, take_sizes
from megatron_bert.training.pretraining import Pretraining
from megatron_bert.training.run import find_start
from megatron_bert.training.run_lock import check_run_dir
from parallel.errors import UserError, counted
from parallel.mesh import ParallelLayout
from parallel.process_group import launched_world_size


@dataclass(frozen=True)
class _Checked:
    """A run that a start would not refuse.

    Attributes:
        settings: of it; those of one of several runs that are laid out alike.
        batch: its longest micro batch.
        says: lines on what was found.
        predicted: whether closed forms are of this kind of run.
    """

    settings: RunSettings
    layout: ParallelLayout
    make_objective: Callable[[Any], Objective]
    batch: TokenBatch
    workload: Workload
    says: tuple[str, ...]
    predicted: bool = True


def run_dry_run(arguments: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UserError: whatever a start of the run would refuse; or a rank needs more memory than the device has.
    """
    ranks = launched_world_size() if arguments.gpus is None else arguments.gpus
    if ranks < 1:
        raise UserError(f"--gpus is {ranks}: give 1 or more")
    machine = None if arguments.gpu is None else Machine(load_device(arguments.gpu), NETWORK)
    with checked_run(arguments.command, arguments.config, arguments.overrides, ranks) as run:
        check_run_dir(run.settings.training.run_dir)
        print("\n".join(run.says))
        world_size = run.layout.world_size
        if world_size < ranks:
            print(f"{ranks - world_size:,} of the {ranks} processes would wait as spares")
        layout = layout_of(run.settings, world_size)
        stages = stages_of(run.workload, layout, run.settings.parallel.stage_layers)
        ranks_of_stage = world_size // layout.pipeline
        chosen, says = _chosen(run.workload, layout, stages, arguments.rank)
        for line in says:
            print(line)
        for rank in chosen:
            step = dry_run_rank(run.settings, run.make_objective, run.batch, rank, world_size)
            print("\n".join(report(run.settings, run.workload, rank, world_size, step, predicted=run.predicted)))
            needed = float(max(step.peak_bytes, step.building))
            if run.workload.graphs:  # what is measured runs without
                needed = max(needed, rank_memory(run.workload, layout, stages, rank // ranks_of_stage).needed)
            if machine is not None and needed > usable_bytes(machine):
                raise UserError(
                    f"rank {rank} needs {with_unit(needed)}, and of {machine.device.name} "
                    f"{with_unit(usable_bytes(machine))} are usable: see `megatron-bert plan` for layouts that fit"
                )
        print("\n".join(data_lines(run.settings, run.workload)))
        print("\n".join(checkpoint_lines(run.settings, checkpoint_of(layout, stages), disk=2.0)))


@contextmanager
def checked_run(command: str, config: Path, overrides: list[str], ranks: int) -> Iterator[_Checked]:
    """Check a run as its start would; the model that it starts from is open while the block lasts."""
    if command == "pretrain":
        yield _checked_pretraining(config, overrides, ranks)
        return
    settings: Any
    variants: dict[str, Any]
    procedure: FinetuneProcedure
    if command == "quantize":
        settings = load_sections(config, overrides, QuantizeSettings)
        check_quantize(settings)
        variants, procedure = quantize_variants(settings), QuantizeProcedure()
    else:
        settings = load_sections(config, overrides, FinetuneSettings)
        variants, procedure = seed_variants(settings), FinetuneProcedure()
    layout = check_layout(settings, ranks)
    with checked_runs(settings, variants, procedure, layout) as checked:
        if not checked.objectives:
            raise FinishedRunError(
                f"{settings.training.run_dir} holds the results of this run: nothing is left to do; remove them to "
                "train again"
            )
        name, objective = next(iter(checked.objectives.items()))
        yield _checked_task(variants[name], layout, objective, ranks, len(checked.objectives))


def _checked_pretraining(config: Path, overrides: list[str], ranks: int) -> _Checked:
    settings = take_sizes(load_settings(config, overrides))
    layout = check_settings(settings, ranks)
    tokenizer = check_inputs(settings)
    start = find_start(settings, Pretraining(settings, tokenizer)).checkpoint
    model = settings.model_config_for(tokenizer.vocab_size, tokenizer.pad_id)
    return _Checked(
        settings,
        layout,
        lambda own: Pretraining(own, tokenizer),
        longest_batch(settings),
        workload_of(settings, model, settings.training.steps, settings.data.seq_length),
        (
            f"settings, tokenizer and data are good for {counted(ranks, 'process', 'processes')}; it would start from "
            f"{start or 'the beginning'}",
        ),
    )


def _checked_task(
    settings: FinetuneSettings, layout: ParallelLayout, objective: Finetuning, ranks: int, runs: int
) -> _Checked:
    batch, task = longest_task_batch(objective, layout), objective.task
    size = settings.training.micro_batch_size
    head = TaskHead(
        outputs=task.head.outputs,
        rows=len(batch.rows) // size,
        pooled=task.head.kind in ("sequence", "choice"),
        sequences=objective.most_features,
    )
    start = find_start(settings, objective).checkpoint
    says = [
        f"settings, model, tokenizer and data are good for {counted(ranks, 'process', 'processes')}; "
        f"it would start from {start or settings.model.from_}",
        f"{task.settings.name}: {counted(len(objective.instances), 'training sequence')} of up to "
        f"{batch.layout.length} tokens, {counted(objective.total_steps, 'step')}"
        f"{f' in each of {runs} runs' if runs > 1 else ''}",
    ]
    if task.labels:
        says.append(f"labels: {', '.join(task.labels)}")
    if objective.float32_activations:
        says.append("the step below is of the model before it is quantized: quantizers keep more")
    if task.bad_rows.count:
        says.append(f"{counted(task.bad_rows.count, 'bad row')} would be skipped, such as {task.bad_rows.reasons[0]}")
    return _Checked(
        settings,
        layout,
        lambda _: objective,
        batch,
        workload_of(settings, objective.config, max(objective.total_steps, 1), batch.layout.length, head),
        tuple(says),
        predicted=not objective.float32_activations,
    )


class FinishedRunError(UserError):
    """A start of the run would find its results, and do nothing."""


def measure(command: str, config: Path, overrides: list[str], world_size: int) -> list[str]:
    """Lines on a run that is about to be queued: what was checked, and what the ranks that take most memory need.

    Files of pretraining need not be here. A model to start from and data of a task are checked if they are.

    Args:
        command: pretrain, finetune or quantize.

    Raises:
        UserError: the run would be refused where it starts.
    """
    if command == "pretrain":
        return _measure_unseen(config, overrides, world_size)
    settings = load_sections(config, overrides, QuantizeSettings if command == "quantize" else FinetuneSettings)
    files = [path for name in ("train", "valid", "test", "directory") for path in _files(getattr(settings.data, name))]
    absent = next((path for path in (settings.model.from_, *files) if not path.exists()), None)
    if absent is not None:
        return [f"dry run: {absent} is not here, so model and data are checked where the job starts"]
    try:
        with checked_run(command, config, overrides, world_size) as run:
            lines = [f"dry run: {line}" for line in run.says]
            steps = _fullest_steps(run.settings, run.workload, run.make_objective, run.batch, world_size)
            return lines + [_short(rank, world_size, step) for rank, step in steps]
    except FinishedRunError as error:
        return [f"dry run: {error}"]


def _files(value: object) -> Iterator[Path]:
    """The files of a setting, whichever form it has."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _files(item)


def _measure_unseen(config: Path, overrides: list[str], world_size: int) -> list[str]:
    settings = load_settings(config, overrides)
    # What a run asks of its vocabulary before its first sample, of the usual one.
    words = cast(Tokenizer, SimpleNamespace(vocab_size=USUAL_VOCABULARY, pad_id=0, fingerprint=""))
    model = settings.model_config_for(words.vocab_size, words.pad_id)
    workload = workload_of(settings, model, settings.training.steps, settings.data.seq_length)
    batch = longest_batch(settings)
    steps = _fullest_steps(settings, workload, lambda own: Pretraining(own, words), batch, world_size)
    return [_short(rank, world_size, step) for rank, step in steps]


def _fullest_steps(
    settings: RunSettings,
    workload: Workload,
    make_objective: Callable[[Any], Objective],
    batch: TokenBatch,
    world_size: int,
) -> Iterator[tuple[int, StepMeasurement]]:
    """The ranks of a run that are measured where none is asked for, with a step of each."""
    layout = layout_of(settings, world_size)
    chosen, _ = _chosen(workload, layout, stages_of(workload, layout, settings.parallel.stage_layers), None)
    for rank in chosen:
        yield rank, dry_run_rank(settings, make_objective, batch, rank, world_size)


def _short(rank: int, world_size: int, step: StepMeasurement) -> str:
    sent = sum(seen.bytes for seen in step.traffic.values())
    return (
        f"dry run: rank {rank} of {world_size} takes {with_unit(step.peak_bytes)} at its peak, "
        f"{with_unit(step.flops, OPERATIONS)} and {with_unit(sent, DECIMAL_BYTES, 2)} of messages a step"
    )


def _chosen(
    workload: Workload, layout: Layout, stages: list[Stage], ranks: Sequence[int] | None
) -> tuple[list[int], list[str]]:
    """Those asked for; or the first of the pipeline rank that takes most memory, and of the first and the last one.

    Returns:
        ranks, and lines that say why.
    """
    world_size, pipeline = layout.world_size, layout.pipeline
    for rank in ranks or ():
        if not 0 <= rank < world_size:
            raise UserError(f"--rank is {rank}: give 0 to {world_size - 1}")
    if ranks is not None:
        return list(ranks), []
    each, (place, _) = world_size // pipeline, fullest(workload, layout, stages)
    chosen = sorted({0, place * each, (pipeline - 1) * each})
    says = f"of {pipeline} pipeline ranks, {place} takes most memory by closed form: it begins with rank {place * each}"
    return chosen, [says] if pipeline > 1 else []


def report(
    settings: RunSettings, workload: Workload, rank: int, world_size: int, step: StepMeasurement, *, predicted: bool
) -> list[str]:
    """What a step of one rank took, beside what the closed forms say.

    Args:
        predicted: whether closed forms are of this kind of run.
    """
    layout = layout_of(settings, world_size)
    stages = stages_of(workload, layout, settings.parallel.stage_layers)
    place, in_stage = divmod(rank, world_size // layout.pipeline)
    replayed, workload = workload, replace(workload, graphs=False)  # what is measured runs as it is
    gib, tflop = unit_of(step.peak_bytes), unit_of(step.flops, OPERATIONS)
    memory = flops = ""
    if predicted:
        memory = f"; {gib.number(rank_memory(workload, layout, stages, place).peak, 2)} by closed form"
        flops = f", {tflop.number(rank_flops(workload, layout, stages, place), 2)} by closed form"
    lines = [
        f"rank {rank} of {world_size}: {with_unit(step.peak_bytes, digits=2)} at its peak "
        f"({parts_of(step.peak, gib)}){memory}",
        f"  between steps {gib.number(sum(step.resident.values()), 2)} {gib.name}, "
        f"{gib.number(step.building, 2)} while it is built; {with_unit(step.flops, OPERATIONS, 2)} per step{flops}",
    ]
    if replayed.graphs:
        needed = with_unit(rank_memory(replayed, layout, stages, place).peak, digits=2)
        lines.append(f"  as CUDA graphs, in which micro batches in flight have places of their own, {needed}")
    closed = totals(step_messages(workload, layout, stages, place, in_stage // layout.tensor)) if predicted else None
    for what, seen in sorted(step.traffic.items()):
        expected = (seen.count, seen.bytes)
        if closed is not None:
            expected = closed.get((what.kind, what.group, what.dtype, what.size), (0, 0))
        same = "" if expected == (seen.count, seen.bytes) else f", {expected} by closed form"
        among = f"{what.size} ({what.group.replace('_', ' ')})"
        size = f"{with_unit(seen.bytes, DECIMAL_BYTES, 3)} in {what.dtype} in all"
        lines.append(f"  {what.kind} over {among}: {seen.count:,} of {size}{same}")
    return lines
