# SPDX-License-Identifier: Apache-2.0
"""How long a step takes: products, attention, memory, messages, and the pipeline between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_bert.planning.communication import Message, tensor_messages_of_ends, tensor_messages_of_layer
from megatron_bert.planning.divided_weights import (
    Gathering,
    added_bytes,
    gathering_of,
    layer_unit,
    laying_out,
    root_unit,
)
from megatron_bert.planning.fullest import most
from megatron_bert.planning.layouts import Layout, Stage, schedule_of
from megatron_bert.planning.machine import Machine
from megatron_bert.planning.workload import Workload
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, Timeline, simulate

#: That the host starts for a layer: forward, backward to its input, and for the gradients of its weights.
OPERATORS, COMPILED_OPERATORS = (55, 55, 12), (30, 30, 12)
#: What sharded parameters and functional collectives add on tensor ranks where layers are not compiled, in as many.
TENSOR_OPERATORS = (50, 85)


class Times(NamedTuple):
    """Seconds of a stage for a micro batch.

    Attributes:
        forward, backward_input, backward_weight: of the actions.
    """

    forward: float
    backward_input: float
    backward_weight: float

    @property
    def total(self) -> float:
        """All three."""
        return self.forward + self.backward_input + self.backward_weight


def layer_times(
    workload: Workload, layout: Layout, machine: Machine, gathering: Gathering, *, top: bool = False
) -> Times:
    """Of a layer for a micro batch, whose weights are gathered in both directions where they are divided.

    Args:
        top: whether heads read its result, of which one tensor rank on processors computes no more than that.
    """
    config, number, compute = workload.config, workload.number_bytes, workload.compute
    hidden, tensor = config.hidden_size, layout.tensor
    tokens = workload.tokens(layout.micro_batch, layout.split_tokens)
    own = tokens / layout.split_tokens
    wide, inner = config.intermediate_size / tensor, hidden / tensor
    selects = top and tensor == 1 and not (workload.compiled or workload.fused_attention)
    after = workload.read_tokens(layout.micro_batch) if selects else tokens
    shapes = [(tokens, 3 * inner, hidden), (after, hidden, inner), (after, wide, hidden), (after, hidden, wide)]
    forward = sum(machine.product(rows, out, into, compute) for rows, out, into in shapes)
    backward = sum(machine.product(rows, into, out, compute) for rows, out, into in shapes)
    weights = [machine.product(out, into, rows, compute) for rows, out, into in shapes]
    scores = machine.attention(4 * tokens * workload.length * inner, compute, config.attention_probs_dropout_prob > 0)
    # Norms, dropout and sums on the stream of features; the activation; fusing compilers save about a third.
    drops = config.hidden_dropout_prob > 0
    waste = 1.0 if workload.compiled else 1.5
    stream, act = (own + after / layout.split_tokens) / 2 * hidden, after * wide
    moved = waste * (stream * (10 * number + (2 if drops else 0)) + act * 2 * number)
    moved_back = waste * (stream * (16 * number + (2 if drops else 0)) + act * 3 * number + tokens * inner * 7 * number)
    moved_weights = (4 * hidden * inner + 2 * hidden * wide) * added_bytes(workload, layout)
    link = machine.link(layout, "tensor")
    size = tokens * hidden * number
    each = {kind: machine.message(kind, size, tensor, link) for kind in ("all-reduce", "all-gather", "reduce-scatter")}
    ahead, behind = tensor_messages_of_layer(layout)
    sent = sum(count * each[kind] for kind, count in ahead.items())
    sent_back = sum(count * each[kind] for kind, count in behind.items())
    if tensor > 1 and not layout.splits_backward:
        # Sums of input gradients run beside the weight gradients of the two column-parallel products.
        summed = machine.unattended("reduce-scatter" if layout.sequence else "all-reduce", size, tensor, link)
        sent_back -= min(summed, weights[0]) + min(summed, weights[2])
        if layout.sequence:
            sent_back -= min(2 * machine.unattended("all-gather", size, tensor, link), backward / 2)
    ahead_operators, back_operators, weight_operators = COMPILED_OPERATORS if workload.compiled else OPERATORS
    if tensor > 1 and not workload.compiled:
        ahead_operators, back_operators = ahead_operators + TENSOR_OPERATORS[0], back_operators + TENSOR_OPERATORS[1]
    ahead_seconds, back_seconds = forward + scores + machine.moving(moved), backward + 2.5 * scores
    back_seconds += machine.moving(moved_back)
    again = 0.0
    if layout.recompute == "full":
        again = machine.with_host(ahead_seconds, ahead_operators) + sent - machine.product(after, hidden, wide, compute)
    elif layout.recompute == "selective":
        again = machine.moving(waste * act * 2 * number)
    times = Times(
        machine.with_host(ahead_seconds + gathering.receiving, ahead_operators + gathering.operators) + sent,
        machine.with_host(back_seconds + gathering.receiving, back_operators + gathering.operators) + sent_back + again,
        machine.with_host(sum(weights) + machine.moving(moved_weights), weight_operators),
    )
    # A GPU computes with the layer before while weights of the next one are gathered.
    beside = (
        (times.forward, times.backward_input + times.backward_weight) if machine.device.asynchronous else (0.0, 0.0)
    )
    waits = [max(0.0, gathering.sending - seconds) for seconds in beside]
    return Times(times.forward + waits[0], times.backward_input + waits[1], times.backward_weight)


def ends_times(workload: Workload, layout: Layout, stage: Stage, machine: Machine) -> Times:
    """Of what a stage has besides layers: embeddings, and heads with their losses."""
    config, number, compute = workload.config, workload.number_bytes, workload.compute
    hidden, rows = config.hidden_size, config.padded_vocab_size / layout.tensor
    forward = backward = weight = 0.0
    if stage.part.first:
        stream = workload.tokens(layout.micro_batch, layout.split_tokens) / layout.split_tokens * hidden
        forward += machine.with_host(machine.moving(stream * 12 * number), 15)
        # The gradient of the whole table is made, and added.
        table = rows * hidden * (number + added_bytes(workload, layout))
        backward += machine.with_host(machine.moving(stream * 8 * number + table), 15)
    if stage.part.last:
        slots = layout.micro_batch * workload.slots
        logits = slots * rows
        products = [(slots, rows, hidden), (slots, hidden, hidden)] if slots else []
        forward += machine.with_host(
            sum(machine.product(*shape, compute) for shape in products) + machine.moving(logits * (2 * number + 12)), 25
        )
        backward += machine.with_host(
            sum(machine.product(m, k, n, compute) for m, n, k in products) + machine.moving(logits * (4 * number + 28)),
            35,
        )
        weight += sum(machine.product(n, k, m, compute) for m, n, k in products)
        if slots:
            weight += machine.moving(rows * hidden * (number + 8))
    if not machine.device.asynchronous:  # between GPUs these few take microseconds
        link = machine.link(layout, "tensor")
        for message in tensor_messages_of_ends(workload, layout, stage):
            forward += machine.message(message.kind, message.bytes, message.size, link)
    return Times(forward, backward, weight)


@dataclass(frozen=True)
class StepTime:
    """Where the time of a step goes, on the rank that takes longest.

    Attributes:
        pipeline: seconds of forward and backward passes, bubbles included.
        bubble: idle share of these.
        data: seconds of messages over the data axis that nothing hides.
        optimizer: seconds of the update.
        timeline: of the pipeline, where it was simulated.
        sharing: how many times as long all of it is for ranks that share processors.
    """

    pipeline: float
    bubble: float
    data: float
    optimizer: float
    timeline: Timeline | None = None
    sharing: float = 1.0

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.pipeline + self.data + self.optimizer

    def longer(self, factor: float) -> StepTime:
        """The same where everything takes so many times as long, for ranks share processors."""
        timeline = None if self.timeline is None else self.timeline.longer(factor)
        return StepTime(
            self.pipeline * factor, self.bubble, self.data * factor, self.optimizer * factor, timeline, factor
        )


def stage_times(workload: Workload, layout: Layout, stages: list[Stage], machine: Machine) -> list[Times]:
    """Of every stage for a micro batch."""
    number = workload.number_bytes
    gathering = gathering_of(layer_unit(stages[0], number), layout, machine)
    layer = layer_times(workload, layout, machine, gathering)
    top = layer if workload.fused_attention else layer_times(workload, layout, machine, gathering, top=True)
    found: dict[tuple[int, bool, bool], Times] = {}
    for stage in stages:
        if stage.kind in found:
            continue
        layers = [layer] * len(stage.part.layers)
        if stage.part.last and layers:
            layers[-1] = top
        ends = ends_times(workload, layout, stage, machine)
        # Nothing runs beside the gather of what is outside of layers: it begins when the micro batch does.
        root = gathering_of(root_unit(stage, number), layout, machine)
        operators = 0 if machine.device.asynchronous else root.operators  # the host of a GPU is ahead of it
        gathered = machine.with_host(root.sending + root.receiving, operators)
        found[stage.kind] = Times(
            sum(each.forward for each in layers) + ends.forward + gathered,
            sum(each.backward_input for each in layers) + ends.backward_input,
            sum(each.backward_weight for each in layers) + ends.backward_weight,
        )
    return [found[stage.kind] for stage in stages]


def step_time(
    workload: Workload,
    layout: Layout,
    stages: list[Stage],
    messages: Sequence[list[Message]],
    machine: Machine,
    *,
    simulated: bool = True,
) -> StepTime:
    """The time of a step.

    Args:
        workload: what is computed.
        layout: how.
        stages: of the layout, all of them.
        messages: of ranks of the pipeline in a step, for what they wait for over the data axis: the first rank's, and
            of others whose stages are unlike.
        machine: where.
        simulated: run the schedule; or else take the closed form of its bubble, to compare many layouts.
    """
    times = stage_times(workload, layout, stages, machine)
    pipeline, bubble, timeline = _pipeline(workload, layout, times, machine, simulated)
    wait = max(_waits(layout, times, own, machine) for own in messages) + laying_out(workload, layout, stages, machine)
    found = StepTime(pipeline, bubble, wait, _optimizer(workload, layout, stages, machine), timeline)
    ranks = machine.ranks_per_processor(layout.world_size)
    if ranks == 1:
        return found
    work = _work(workload, layout, stages, messages[0], replace(machine, working=True))
    together = max(0.0, found.seconds - work) if _wait_together(layout, machine) else 0.0
    return found.longer((together + shared_seconds(found.seconds - together, work, ranks)) / found.seconds)


def _wait_together(layout: Layout, machine: Machine) -> bool:
    """Whether messages are among all ranks that share processors: while they are sent, none of these computes."""
    sharing = min(layout.world_size, machine.device.devices_per_node)
    hybrid = 1 < layout.shards < layout.data
    data = layout.shards if hybrid else layout.data
    return layout.tensor >= sharing or (layout.tensor == 1 and data >= sharing)


def shared_seconds(path: float, work: float, ranks: float) -> float:
    """Seconds of something that ranks do at the same time, of which several take turns on a processor.

    While one waits for a message or for its turn in the pipeline, the others compute: customers that go round between
    a server and a delay, by mean value analysis (Reiser and Lavenberg 1980).

    Args:
        path: seconds that it takes a rank with a processor of its own.
        work: of these, that the processor is at work.
        ranks: on a processor; between whole numbers of them, times are interpolated.
    """
    elsewhere, queue, cycles = max(0.0, path - work), 0.0, [0.0]
    for count in range(1, math.ceil(ranks) + 1):
        response = work * (1 + queue)
        cycles.append(response + elsewhere)
        queue = count * response / cycles[-1] if response else 0.0
    return cycles[-2] + (cycles[-1] - cycles[-2]) * (ranks - len(cycles) + 2)


def _work(workload: Workload, layout: Layout, stages: list[Stage], messages: list[Message], machine: Machine) -> float:
    """Seconds for which a rank keeps a processor at work, on average of those of a pipeline."""
    times = stage_times(workload, layout, stages, machine)
    passes = layout.microbatches(workload) * sum(time.total for time in times) / layout.pipeline
    link = machine.link(layout, "pipeline")
    sent = sum(m.count * machine.message(m.kind, m.bytes, 2, link) for m in messages if m.group == "pipeline")
    once = laying_out(workload, layout, stages, machine) + _optimizer(workload, layout, stages, machine)
    return passes + sent + _waits(layout, times, messages, machine) + once


def _waits(layout: Layout, times: list[Times], messages: list[Message], machine: Machine) -> float:
    """Seconds of messages over the data axis that nothing hides, and of the few numbers at the end of a step."""
    wait = 0.0
    of_data = [
        message
        for message in messages
        if message.group.startswith("data") and message.dtype not in ("int64", "float64")
    ]
    per_microbatch = max(time.total for time in times) * layout.chunks
    for kind, hidden_by in (("reduce-scatter", 0.6), ("all-reduce", 0.6), ("all-gather", 0.3)):
        found = [message for message in of_data if message.kind == kind and message.bytes > 8]
        if not layout.flat and kind == "all-gather":
            continue  # waited for in every layer
        seconds = sum(m.count * machine.message(kind, m.bytes, m.size, machine.link(layout, m.group)) for m in found)
        if machine.device.asynchronous and seconds:
            # The last bucket has nothing left to hide behind.
            seconds = max(seconds / max(1, len(found)), seconds - hidden_by * per_microbatch)
        wait += seconds
    small = [m for m in messages if m.bytes <= 16 or m.group == "tied"]
    wait += sum(m.count * machine.message(m.kind, m.bytes, m.size, machine.network) for m in small) if small else 0.0
    if not machine.device.asynchronous:  # the host of a GPU is ahead of it
        wait += machine.message("all-reduce", _STOP_BYTES, layout.world_size, machine.link(layout, "world"))
    return wait


#: Of the message by which ranks agree, after every step, whether to stop.
_STOP_BYTES = 32


def _optimizer(workload: Workload, layout: Layout, stages: list[Stage], machine: Machine) -> float:
    """Seconds of norm and update: gradient, weights and moments are read, weights and moments written."""
    count = most(layout, stages, lambda stage: stage.count)
    rate = machine.device.optimizer_gb_per_second
    size = count / layout.shards * (4 + 28 + workload.number_bytes) + 4 * count
    return size / (rate * 1e9) if rate else machine.moving(size)


def _pipeline(
    workload: Workload, layout: Layout, times: list[Times], machine: Machine, simulated: bool
) -> tuple[float, float, Timeline | None]:
    microbatches = layout.microbatches(workload)
    if layout.pipeline == 1:
        return microbatches * sum(time.total for time in times), 0.0, None
    tokens = workload.tokens(layout.micro_batch, layout.split_tokens) / layout.split_tokens
    size = tokens * workload.config.hidden_size * workload.number_bytes
    message = machine.message("send", size, 2, machine.link(layout, "pipeline"))
    if not simulated:
        by_rank = [sum(times[number].total for number in layout.stages_of(rank)) for rank in range(layout.pipeline)]
        bubble = SCHEDULES[layout.schedule].bubble(layout.pipeline, microbatches, layout.chunks)
        return microbatches * max(by_rank) / (1 - bubble), bubble, None
    costs = Costs(
        [time.forward for time in times],
        [time.backward_input for time in times],
        [time.backward_weight for time in times],
        message,
    )
    few = _SIMULATED_ROUNDS * layout.pipeline
    if microbatches <= 2 * few:
        timeline = simulate(schedule_of(layout.schedule, layout.pipeline, microbatches, layout.chunks), costs)
        return timeline.makespan, timeline.bubble, timeline
    # A step is a beginning, an end and rounds that are alike: each adds as much as the one before.
    first, second = (
        simulate(schedule_of(layout.schedule, layout.pipeline, few * n, layout.chunks), costs) for n in (1, 2)
    )
    seconds = second.makespan + (second.makespan - first.makespan) * (microbatches - 2 * few) / few
    busy = sum(time.total for time in times) * microbatches / layout.pipeline
    return seconds, 1 - busy / seconds, second


#: Rounds of micro batches through a pipeline that are simulated, twice, to know how much each adds.
_SIMULATED_ROUNDS = 3
