# SPDX-License-Identifier: Apache-2.0
"""``megatron-bert plan``: which layout of a run is fastest on given devices, whether it fits, and what it costs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_bert.arguments import check_outputs
from megatron_bert.config import RunSettings
from megatron_bert.planning.devices import GIB, load_device, load_network
from megatron_bert.planning.layouts import stages_of
from megatron_bert.planning.machine import Machine
from megatron_bert.planning.memory import layout_of
from megatron_bert.planning.needs import checkpoint_lines, checkpoint_of, data_lines, host_lines
from megatron_bert.planning.picture import draw_plan
from megatron_bert.planning.planned import Planned, load_planned
from megatron_bert.planning.search import SIMULATED, Prediction, Search, predict, search, usable_bytes
from megatron_bert.planning.units import DECIMAL_BYTES, parts_of, short, unit_of, with_unit
from megatron_bert.planning.workload import Workload
from parallel.errors import UserError
from parallel.whole_files import reporting, write_text


def run_plan(arguments: argparse.Namespace) -> None:
    """Run the subcommand.

    Raises:
        UserError: settings, a device or a number that cannot be; or no layout fits.
    """
    for name, value in (("--gpus", arguments.gpus), ("--top", arguments.top), ("--disk", arguments.disk)):
        if not 0 < value < float("inf"):
            raise UserError(f"{name} is {value}: give a number above 0")
    check_outputs(
        {"--write": arguments.write, "--png": arguments.png},
        {
            "CONFIG": arguments.config,
            "--encoder": arguments.encoder,
            "--gpu": Path(arguments.gpu),
            "--network": arguments.network,
        },
    )
    if arguments.write is not None and arguments.write.exists():
        raise UserError(f"--write {arguments.write} is there already: name a new file, or remove that one")
    machine = Machine(load_device(arguments.gpu), load_network(arguments.network))
    planned = load_planned(arguments.config, arguments.overrides, arguments.encoder).on(machine.device)
    settings, workload = planned.settings, planned.workload
    configured = _configured(planned, arguments.gpus, machine)
    found = search(
        workload,
        arguments.gpus,
        machine,
        configured if isinstance(configured, Prediction) else None,
        most=max(SIMULATED, arguments.top),
        counted=arguments.explain,
    )
    print("\n".join(_heading(workload, machine, arguments.gpus, arguments.network, planned.notes)))
    print(f"as configured: {_judged(configured, arguments.gpus)}")
    if arguments.explain:
        print("\n".join(["", *_reasons(found, machine)]))
    if not found.ranked:
        raise UserError(_none_fits(found, machine, arguments.gpus))
    print("\n" + table(found.ranked[: arguments.top]))
    best = found.ranked[0]
    print("\n" + "\n".join(_details(settings, best, arguments.disk)))
    if arguments.write is not None:
        with reporting("written", arguments.write, "give --write another file"):
            write_text(arguments.write, with_layout(settings, best).dump())
        print(f"settings of the first line: {arguments.write}")
    if arguments.png is not None:
        with reporting("written", arguments.png, "give --png another file"):
            draw_plan(found.ranked[: min(max(arguments.top, 12), SIMULATED)], arguments.png)


def _heading(workload: Workload, machine: Machine, ranks: int, network: Path | None, notes: Sequence[str]) -> list[str]:
    device, between = machine.device, []
    if ranks > device.devices_per_node:
        link = machine.network
        source_of_link = "published; --network gives another" if network is None else f"of {network}"
        between = [
            f"between nodes of {device.devices_per_node}: {link.gigabytes_per_second:g} GB/s a rank and "
            f"{link.latency_microseconds:g} us ({source_of_link})"
        ]
        if device.source == "measured" and device.devices_per_node == 1:
            notes = [
                *notes,
                f"a single rank was measured, so each of the {ranks} counts as a node of its own: measure all ranks of "
                "a node with `megatron-bert bench --ranks N`",
            ]
    elif network is not None:
        notes = [*notes, f"all ranks are in a node: --network {network} is not counted with"]
    usable = usable_bytes(machine) / GIB
    return [
        f"{ranks} x {device.name}: {device.peak_tflops[workload.compute]:.4g} TFLOP/s in {workload.compute}, "
        f"{device.memory_gib:.4g} GiB{f', {usable:.1f} of them usable' if device.asynchronous else ''} "
        f"({device.source}{f' by {device.note}' if device.note else ''})",
        *between,
        *(f"note: {note}" for note in notes),
    ]


def _configured(planned: Planned, ranks: int, machine: Machine) -> Prediction | str:
    """Of the layout that the settings have on so many ranks; or why a start of the run would refuse it."""
    try:
        planned.check(planned.settings, ranks)
    except UserError as error:
        return str(error)
    layout = layout_of(planned.settings, ranks)
    return predict(planned.workload, layout, machine, planned.settings.parallel.stage_layers)


def _judged(configured: Prediction | str, ranks: int) -> str:
    if isinstance(configured, str):
        return f"not possible: {configured}"
    over = configured.memory.needed - usable_bytes(configured.machine)
    spares = ranks - configured.layout.world_size
    waiting = f"; {spares:,} of the {ranks:,} processes would wait as spares" if spares else ""
    return one_line(configured) + (f"; {with_unit(over)} too much" if over > 0 else "") + waiting


def one_line(prediction: Prediction) -> str:
    """A prediction in a few words."""
    layout = prediction.layout
    parts = [f"tensor {layout.tensor}{' (sequence)' if layout.sequence else ''}"]
    if layout.pipeline > 1:
        parts.append(f"pipeline {layout.pipeline} ({layout.schedule}, {layout.chunks} per rank)")
    parts += [f"data {layout.data} ({layout.sharding})", f"micro batch {layout.micro_batch}", layout.recompute]
    return (
        f"{', '.join(parts)}: {with_unit(prediction.memory.needed)}, {prediction.time.seconds:.3g} s a step, "
        f"{prediction.tokens_per_second:,.0f} tokens/s, MFU {prediction.mfu:.1%}"
    )


def table(predictions: Sequence[Prediction]) -> str:
    """Layouts, one per line; with what the run takes where its steps are known."""
    unit = unit_of(max(prediction.memory.needed for prediction in predictions))
    rows = [
        (
            "tensor",
            "pipeline",
            "data",
            "micro",
            "recompute",
            unit.name,
            "bubble",
            "s/step",
            "tokens/s",
            "MFU",
            *(("days", "GPU h") if predictions[0].hours is not None else ()),
        )
    ]
    for prediction in predictions:
        layout = prediction.layout
        pipeline = f"{layout.pipeline} {layout.schedule} x {layout.chunks}" if layout.pipeline > 1 else "1"
        rows.append(
            (
                f"{layout.tensor}{' seq' if layout.sequence else ''}",
                pipeline,
                f"{layout.data} {layout.sharding}",
                str(layout.micro_batch),
                layout.recompute,
                unit.number(prediction.memory.needed),
                f"{prediction.time.bubble:.1%}",
                f"{prediction.time.seconds:.3g}",
                f"{prediction.tokens_per_second:,.0f}",
                f"{prediction.mfu:.1%}",
                *(short(time) for time in (prediction.days, prediction.device_hours) if time is not None),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _details(settings: RunSettings, best: Prediction, disk: float) -> list[str]:
    layout, memory, time = best.layout, best.memory, best.time
    unit = unit_of(memory.peak)
    each = best.machine.ranks_per_processor(layout.world_size)
    sharing = f"; {each:g} ranks take turns on a processor: {time.sharing:.2f} times as long" if each > 1 else ""
    lines = [
        f"fastest: {one_line(best)}",
        f"memory of the fullest rank{f' (pipeline rank {best.fullest})' if layout.pipeline > 1 else ''}: "
        f"{parts_of(memory.parts, unit)} {unit.name}"
        + (f"; {with_unit(memory.building)} while it is built" if memory.building > memory.peak else ""),
        f"time: passes {time.pipeline:.3g} s, data axis {time.data:.2g} s, optimizer {time.optimizer:.2g} s{sharing}",
    ]
    sums: dict[tuple[str, str], tuple[int, float]] = {}
    for message in best.messages:
        count, size = sums.get((message.kind, message.group), (0, 0.0))
        sums[message.kind, message.group] = count + message.count, size + message.count * message.bytes
    if sums:
        lines.append("messages of the first rank, of whole tensors:")
    total = sum(size for _, size in sums.values())
    for (kind, group), (count, size) in sums.items():
        if size > min(1e6, total / 1000):
            axis = "data" if group.startswith("data") else group
            link = (
                "inside a node" if best.machine.link(layout, axis) is best.machine.device.link else "over the network"
            )
            lines.append(
                f"  {kind} over {group.replace('_', ' ')}: {count:,} of {with_unit(size, DECIMAL_BYTES, 2)} in all, "
                f"{link}"
            )
    lines += data_lines(settings, best.workload)
    checkpoint = checkpoint_of(layout, stages_of(best.workload, layout, best.stage_layers))
    lines += checkpoint_lines(settings, checkpoint, disk)
    ranks = min(best.machine.device.devices_per_node, layout.world_size)
    return lines + host_lines(settings, best.workload, layout, checkpoint, ranks)


def _reasons(found: Search, machine: Machine) -> list[str]:
    fit = found.tried - sum(found.out.values())
    if fit == found.tried:
        return [f"{found.tried:,} layouts, all of which fit"]
    lines = [f"{found.tried:,} layouts, of which {fit:,} fit; the others are out:"]
    lines += [f"  {count:>6,}  {reason}" for reason, count in found.out.most_common()]
    if found.nearest is not None:
        layout, memory = found.nearest
        lines.append(
            f"of those with too much memory, tensor {layout.tensor}, pipeline {layout.pipeline}, data {layout.data}, "
            f"micro batch {layout.micro_batch}, {layout.sharding} is nearest: {with_unit(memory)} of "
            f"{with_unit(usable_bytes(machine))}"
        )
    return lines


def _none_fits(found: Search, machine: Machine, ranks: int) -> str:
    if found.nearest is not None:
        return (
            f"no layout fits on {ranks} x {machine.device.name}: the smallest takes {with_unit(found.nearest[1])} "
            f"of the {with_unit(usable_bytes(machine))} that are usable; take more or larger devices"
        )
    reasons = "; ".join(reason for reason, _ in found.out.most_common(2))
    return f"no layout is possible on {ranks} x {machine.device.name} ({reasons}): choose another number with --gpus"


def with_layout(settings: RunSettings, prediction: Prediction) -> RunSettings:
    """The settings with the layout of a prediction."""
    layout = prediction.layout
    parallel = settings.parallel.model_copy(
        update={
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "data": layout.data,
            "sequence": layout.sequence,
            "schedule": layout.schedule,
            "virtual_stages": layout.chunks if layout.chunks > 1 else None,
            "stage_layers": prediction.stage_layers,
            "sharding": layout.sharding,
            "shard_size": layout.shard_size,
        }
    )
    training = settings.training.model_copy(
        update={"micro_batch_size": layout.micro_batch, "recompute": layout.recompute}
    )
    return settings.model_copy(update={"parallel": parallel, "training": training})
