# SPDX-License-Identifier: Apache-2.0
"""Messages of a step, by kind and by the ranks they are among: exactly those that a run sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from megatron_bert.planning.layouts import Layout, Stage
from megatron_bert.planning.parameters import WORDS, Parameter
from megatron_bert.planning.workload import Workload
from megatron_bert.tables import OPTIMIZERS, found_at
from megatron_bert.training.optimizer import weight_decay_of
from megatron_bert.training.update_rules import UpdateRule
from parallel.pipeline.schedules import SCHEDULES


@dataclass(frozen=True)
class Message:
    """A collective or a message between stages.

    Attributes:
        kind: all-reduce, all-gather, reduce-scatter, send or receive.
        group: axis of the ranks it is among, or ``tied``.
        dtype: of its numbers.
        size: ranks of the group.
        bytes: of the whole tensor, gathered or before scattering.
        count: of such messages.
    """

    kind: str
    group: str
    dtype: str
    size: int
    bytes: int
    count: int = 1


def tensor_messages_of_layer(layout: Layout) -> tuple[Counter[str], Counter[str]]:
    """Collectives over tensor ranks of a layer and micro batch, forward and backward; each of ``[T, H]``.

    Without sequence parallelism: an all-reduce behind each of the two row-parallel products, and one of each gradient
    that enters a column-parallel product. With it these are a gather and a scatter each, and the input of a
    column-parallel product is gathered once more for its weight gradient, but where that comes on its own.
    """
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    if layout.tensor == 1:
        return forward, backward
    if layout.sequence:
        forward.update({"all-gather": 2, "reduce-scatter": 2})
        backward.update({"all-gather": 2 if layout.splits_backward else 4, "reduce-scatter": 2})
        # The recomputation ends before the sum behind the last product.
        if layout.recompute == "full":
            backward.update({"all-gather": 2, "reduce-scatter": 1})
    else:
        forward["all-reduce"], backward["all-reduce"] = 2, 2
        if layout.recompute == "full":
            backward["all-reduce"] += 1
    return forward, backward


def tensor_messages_of_ends(workload: Workload, layout: Layout, stage: Stage) -> Iterator[Message]:
    """Those of a stage and micro batch besides its layers': of the embeddings, and of heads with their losses."""
    config, number, size = workload.config, workload.number_bytes, layout.tensor
    if size == 1:
        return
    if stage.part.first:
        hidden = workload.tokens(layout.micro_batch, layout.split_tokens) * config.hidden_size * number
        for kind in ("reduce-scatter", "all-gather") if layout.sequence else ("all-reduce",):
            yield Message(kind, "tensor", workload.compute, size, hidden)
    if not stage.part.last:
        return
    slots, first = layout.micro_batch * workload.slots, layout.micro_batch * workload.pairs
    if workload.pretraining:
        row = config.hidden_size * number
        if layout.sequence:  # the rows that the heads read
            yield Message("all-reduce", "tensor", workload.compute, size, (slots + first) * row)
        yield Message("all-reduce", "tensor", workload.compute, size, slots * row)
        # Of the cross entropy: the maximum, then the sum of exponentials and the label's logit.
        yield Message("all-reduce", "tensor", "float32", size, slots * 4)
        yield Message("all-reduce", "tensor", "float32", size, 2 * slots * 4)
    elif layout.sequence and workload.head is not None:
        rows = layout.micro_batch * workload.head.rows
        yield Message("all-reduce", "tensor", workload.compute, size, rows * config.hidden_size * number)


def _tensor_messages(workload: Workload, layout: Layout, stage: Stage, microbatches: int) -> Iterator[Message]:
    hidden = workload.tokens(layout.micro_batch, layout.split_tokens) * workload.config.hidden_size
    size, passes = hidden * workload.number_bytes, len(stage.part.layers) * microbatches
    forward, backward = tensor_messages_of_layer(layout)
    for kind, count in (forward + backward).items():
        yield Message(kind, "tensor", workload.compute, layout.tensor, size, count * passes)
    for message in tensor_messages_of_ends(workload, layout, stage):
        yield replace(message, count=microbatches)


def _pipeline_messages(workload: Workload, layout: Layout, rank: int) -> Iterator[Message]:
    """A micro batch goes from each stage to the next one, and its gradient back, whatever the schedule."""
    placement = SCHEDULES[layout.schedule].placement
    owners = [placement.rank(stage, layout.pipeline) for stage in range(layout.pipeline * layout.chunks)]
    crossings = sum((rank in ends) for ends in pairwise(owners) if ends[0] != ends[1])
    if not crossings:
        return
    tokens = workload.tokens(layout.micro_batch, layout.split_tokens) // layout.split_tokens
    each = tokens * workload.config.hidden_size * workload.number_bytes
    for kind in ("send", "receive"):
        count = crossings * layout.microbatches(workload)
        yield Message(kind, "pipeline", workload.compute, layout.pipeline, each, count)


def data_messages(workload: Workload, layout: Layout, stage: Stage, microbatches: int) -> Iterator[Message]:
    """Messages over the data axis of a stage in a step, but for the few numbers at its end."""
    if layout.data == 1:
        return
    if layout.flat:
        axis = "data_shard" if layout.shards > 1 else "data_replicate"
        for bucket in stage.buckets:
            kind = "reduce-scatter" if layout.shards > 1 else "all-reduce"
            yield Message(kind, axis, "float32", layout.data, bucket.size * 4)
            if layout.shards > 1:
                yield Message("all-gather", axis, workload.compute, layout.data, bucket.size * workload.number_bytes)
        return
    # FSDP2 gathers every unit in every micro batch, and scatters gradients in the last backward pass.
    for whole, times in stage.unit_sizes:
        yield Message(
            "all-gather",
            "data_shard",
            workload.compute,
            layout.shards,
            whole * workload.number_bytes,
            times * microbatches,
        )
        yield Message("reduce-scatter", "data_shard", "float32", layout.shards, whole * 4)
        copies = layout.data // layout.shards
        if copies > 1:
            yield Message("all-reduce", "data_replicate", "float32", copies, whole * 4 // layout.shards)


def _closing_messages(workload: Workload, stages: list[Stage], layout: Layout, data_rank: int) -> Iterator[Message]:
    """Once per step: counts of the losses, copies of the embeddings, partial gradients, and norms."""
    copies = layout.data // layout.shards
    axes = [("data_replicate", copies), ("data_shard", layout.shards)]
    for axis, size in axes:
        if size > 1:
            counted = "int64" if workload.pretraining else "float64"  # units of a task have weights
            yield Message("all-reduce", axis, counted, size, 8 * workload.losses)
    tied = [stage for stage in stages if stage.alone]
    if len(tied) == 1:  # both on one rank need no message
        yield Message("all-reduce", "tied", "float32", 2, 4 * _own_words(tied[0], data_rank))
    if layout.sequence:
        for stage in stages:
            if any(parameter.partial for parameter in stage.parameters):
                yield Message("all-reduce", "tensor", "float32", layout.tensor, 4 * _own_partial(stage, data_rank))
    for axis, size in (("tensor", layout.tensor), *axes, ("pipeline", layout.pipeline)):
        if size > 1:
            yield Message("all-reduce", axis, "float32", size, 4)
    for axis, size in (("tensor", layout.tensor), ("data_shard", layout.shards)):
        if size > 1:
            for numbers in _sums_of_optimizer(workload, stages):
                yield Message("all-reduce", axis, "float32", size, 4 * numbers)


def _sums_of_optimizer(workload: Workload, stages: list[Stage]) -> list[int]:
    settings = workload.optimizer
    rule: type[UpdateRule] = found_at(OPTIMIZERS[settings.name])
    own = [(stage, parameter) for stage in stages for parameter in stage.parameters]
    decays = [weight_decay_of(parameter.name, len(parameter.shape), settings) for _, parameter in own]
    return rule.sums(decays, [stage.alone and parameter.name == WORDS for stage, parameter in own])


def _own_words(stage: Stage, data_rank: int) -> int:
    words = stage.parameters.root[0]
    if not stage.flat:
        return _own_rows(words, stage, data_rank)
    return sum(b.own_share(stage.tensor, stage.shards, data_rank, frozenset({words.name})) for b in stage.buckets)


def _own_partial(stage: Stage, data_rank: int) -> int:
    partial = [parameter for parameter in stage.parameters if parameter.partial]
    if not stage.flat:
        return sum(_own_rows(parameter, stage, data_rank) for parameter in partial)
    names = frozenset(parameter.name for parameter in partial)
    return sum(bucket.own_share(stage.tensor, stage.shards, data_rank, names) for bucket in stage.buckets)


def _own_rows(parameter: Parameter, stage: Stage, data_rank: int) -> int:
    """Elements of a parameter on one of the ranks over which FSDP2 divides it by rows."""
    shape = parameter.local_shape(stage.tensor)
    rows = -(-shape[0] // stage.shards)
    place = data_rank % stage.shards
    return max(0, min(rows, shape[0] - place * rows)) * (parameter.local(stage.tensor) // shape[0])


def step_messages(
    workload: Workload, layout: Layout, stages: list[Stage], rank: int = 0, data_rank: int = 0
) -> list[Message]:
    """Every message of one rank in a step.

    Args:
        workload: what is computed.
        layout: how.
        stages: of the layout, all of them.
        rank: place in the pipeline.
        data_rank: place on the data axis, on which the sizes of a few of them depend.
    """
    microbatches = layout.microbatches(workload)
    mine = [stages[number] for number in layout.stages_of(rank)]
    messages = list(_pipeline_messages(workload, layout, rank))
    for stage in mine:
        messages += _tensor_messages(workload, layout, stage, microbatches)
        messages += data_messages(workload, layout, stage, microbatches)
    return messages + list(_closing_messages(workload, mine, layout, data_rank))


def totals(messages: list[Message]) -> dict[tuple[str, str, str, int], tuple[int, int]]:
    """Count and bytes of each kind, group, format and size."""
    sums: dict[tuple[str, str, str, int], tuple[int, int]] = {}
    for message in messages:
        what = message.kind, message.group, message.dtype, message.size
        count, size = sums.get(what, (0, 0))
        sums[what] = count + message.count, size + message.count * message.bytes
    return sums
