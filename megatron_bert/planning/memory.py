# SPDX-License-Identifier: Apache-2.0
"""Memory of a rank by part, in closed form.

Activations of a layer follow Korthikanti et al., arXiv 2205.05198, table 2, with fused attention: for T tokens on a
rank, h features and t tensor ranks in two-byte numbers ``T h (10 + 24 / t)``, or ``34 T h / t`` under sequence
parallelism, of which 2 are masks of dropout. States are those of ZeRO (Rajbhandari et al., arXiv 1910.02054).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megatron_bert.config import RunSettings
from megatron_bert.planning.layouts import Layout, Stage, schedule_of
from megatron_bert.planning.measuring import Part
from megatron_bert.planning.workload import Workload
from parallel.pipeline.actions import ActionKind
from parallel.pipeline.communication import incoming, outgoing
from parallel.pipeline.schedules import SCHEDULES


class StateBytes(NamedTuple):
    """Bytes that a parameter takes between steps.

    Attributes:
        weights, gradients: on each rank.
        optimizer: over all ranks that divide it.
    """

    weights: int
    gradients: int
    optimizer: int


#: Of parameters in flat buffers, by the bytes of a number that is computed with: AdamW's two moments, and master
#: weights where those computed with are not float32. ZeRO stage 1, whose 18 bytes are 6 + 12 / d on d ranks.
FLAT_STATES = {2: StateBytes(2, 4, 12), 4: StateBytes(4, 4, 8)}


#: Micro batches for each rank of a pipeline after which a schedule holds no more of them.
MOST_IN_FLIGHT = 4


@dataclass(frozen=True)
class RankMemory:
    """Memory of a rank when it is most.

    Attributes:
        parts: bytes by what they are for.
        building: bytes before the first step, when the whole parameters in float32 and what takes their place are both
            there: less than a step takes, unless data ranks divide weights.
    """

    parts: dict[Part, float]
    building: float

    @property
    def peak(self) -> float:
        """Bytes of all parts in a step."""
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """Bytes at the peak of a step, or when the trainer is built if that is more."""
        return max(self.peak, self.building)


def layout_of(settings: RunSettings, world_size: int) -> Layout:
    """The layout that settings say.

    Raises:
        UserError: the axes do not multiply to the world size, or the schedule does not take the stages.
    """
    mesh = settings.layout(world_size)
    schedule = settings.schedule(mesh)
    wanted = settings.parallel
    return Layout(
        tensor=mesh.tensor,
        pipeline=mesh.pipeline,
        data=mesh.data,
        sequence=mesh.sequence,
        schedule=schedule.name,
        chunks=schedule.chunks,
        micro_batch=settings.training.micro_batch_size,
        recompute=settings.training.recompute,
        sharding=wanted.sharding,
        shard_size=wanted.shard_size,
    )


# ---------------------------------------------------------------- activations


@dataclass(frozen=True)
class LayerTensors:
    """Bytes of the tensors of a layer for a micro batch, on one rank.

    Attributes:
        input: what it is called with.
        kept: what it keeps for its backward pass, the input included.
        repeated: what it keeps for as long as its own backward pass runs, when it is computed again.
        transient: what its backward pass adds at most.
        queued: what a split backward pass leaves for the weight gradients.
    """

    input: float
    kept: float
    repeated: float
    transient: float
    queued: float


def layer_tensors(workload: Workload, layout: Layout) -> LayerTensors:
    """The tensors of one layer."""
    return _layer_tensors(
        workload, layout.tensor, layout.split_tokens, layout.micro_batch, layout.recompute, layout.splits_backward
    )


@lru_cache(maxsize=65536)
def _layer_tensors(
    workload: Workload, tensor: int, split_tokens: int, micro_batch: int, recompute: str, split: bool
) -> LayerTensors:
    config, number = workload.config, workload.number_bytes
    tokens = workload.tokens(micro_batch, split_tokens)
    own = tokens / split_tokens
    hidden, wide, heads = config.hidden_size, config.intermediate_size / tensor, config.num_attention_heads / tensor
    stream = number * hidden * own
    statistics = 8 * own
    mask = hidden * own if config.hidden_dropout_prob > 0 else 0.0
    # Weight gradients that wait for later take the gathered input with them.
    read = number * hidden * tokens if split else stream
    attention = number * 4 * hidden / tensor * tokens + 4 * heads * tokens
    attention += _written_out(workload, tokens, heads, recompute)
    mlp = number * wide * tokens * (2 if recompute == "none" else 1)
    kept = 2 * (stream + statistics + read + mask) + attention + mlp
    # A split backward pass makes no gradients of weights, but keeps the activation, whose product is through, for them.
    transient = number * tokens * (wide + hidden) + stream + number * wide * (tokens if split else hidden)
    if recompute == "selective":
        transient += number * tokens * wide
    queued = 0.0
    if split:
        inputs = 2 * hidden + hidden / tensor + wide
        gradients = 3 * hidden / tensor + 2 * hidden + wide
        queued = number * tokens * (inputs + gradients)
    if recompute == "full":
        keys = 8 * tokens if mask else 0
        return LayerTensors(stream, stream + keys, kept + number * wide * tokens - stream - 2 * mask, transient, queued)
    return LayerTensors(stream, kept, 0.0, transient, queued)


def _written_out(workload: Workload, tokens: int, heads: float, recompute: str) -> float:
    """Scores, where attention is not fused: on a processor in float32 with dropout."""
    if workload.fused_attention or recompute == "selective":
        return 0.0
    scores = heads * workload.length * tokens
    dropout = workload.config.attention_probs_dropout_prob > 0
    return scores * (2 * workload.number_bytes + (1 + workload.number_bytes if dropout else 0))


class HeadTensors(NamedTuple):
    """Bytes of the heads and their losses for a micro batch.

    Attributes:
        kept: from the forward to the backward pass, but for the next.
        logits: kept of what is as wide as the vocabulary.
        transient: what the backward pass of the loss adds.
        queued: what a split backward pass leaves for the weight gradients.
    """

    kept: float
    logits: float
    transient: float
    queued: float


def head_tensors(workload: Workload, layout: Layout) -> HeadTensors:
    """The tensors of the heads: the logits of masked tokens in float32, and two gradients of their size."""
    config, number = workload.config, workload.number_bytes
    slots = layout.micro_batch * workload.slots
    columns = min(config.vocab_size, config.padded_vocab_size // layout.tensor)
    rows = (4 * slots + 2 * layout.micro_batch * workload.pairs) * config.hidden_size * number
    if workload.head is not None:
        rows = (2 + 2 * workload.head.pooled) * layout.micro_batch * workload.head.rows * config.hidden_size * number
    queued = number * slots * (columns + 2 * config.hidden_size) if layout.splits_backward else 0.0
    return HeadTensors(rows, 4.0 * slots * columns, 8.0 * slots * columns, queued)


# ---------------------------------------------------------------- a rank


def rank_memory(workload: Workload, layout: Layout, stages: list[Stage], rank: int = 0) -> RankMemory:
    """Memory of a rank at its peak: states, what micro batches in flight keep, and the most expensive backward pass.

    Args:
        workload: what is computed.
        layout: how.
        stages: of the layout, all of them.
        rank: place in the pipeline.
    """
    microbatches = layout.microbatches(workload)
    # A rank holds at most all of a few micro batches more than there are ranks, whatever their number.
    few = min(microbatches, MOST_IN_FLIGHT * layout.pipeline) if layout.schedule != "gpipe" else microbatches
    kind = SCHEDULES[layout.schedule]
    mine = [stages[number] for number in kind.placement.stages(rank, layout.pipeline, layout.chunks)]
    parts = _states(workload, layout, mine, microbatches)
    moments = _moments(layout.schedule, layout.pipeline, few, layout.chunks, rank)
    parts |= _in_flight(workload, layout, mine, moments)
    building = 4.0 * sum(stage.count for stage in mine)
    if layout.flat:
        building += parts["weights"] + (0.0 if workload.number_bytes == 4 else parts["weights"] * 2 / layout.shards)
    return RankMemory(parts, building)


def _states(workload: Workload, layout: Layout, stages: list[Stage], microbatches: int) -> dict[Part, float]:
    number = workload.number_bytes
    if layout.flat:
        each = FLAT_STATES[number]
        count = sum(stage.flat_size for stage in stages)
        return {
            "weights": each.weights * count,
            "gradients": each.gradients * count,
            "optimizer": each.optimizer * count / layout.shards,
            "buffers": 0.0,
        }
    # FSDP2: everything divided and float32, and gathered for as long as it is used: the root, and two layers.
    share = sum(stage.share for stage in stages)
    whole = sum(stage.count for stage in stages)
    root = sum(stage.root_count for stage in stages)
    layer = max(min(2, len(stage.part.layers)) * stage.layer_count for stage in stages)
    # Those of several micro batches add up undivided; of a single one, none is there yet when activations are most.
    gradients = 4.0 * whole if microbatches > 1 else 0.0
    return {
        "weights": 4.0 * share,
        "gradients": gradients,
        "optimizer": 8.0 * share,
        "buffers": number * (root + layer),
    }


def _in_flight(
    workload: Workload, layout: Layout, stages: list[Stage], moments: tuple[Moment, ...]
) -> dict[Part, float]:
    layer, head = layer_tensors(workload, layout), head_tensors(workload, layout)
    tokens = workload.tokens(layout.micro_batch, layout.split_tokens)
    mask = tokens / layout.split_tokens * workload.config.hidden_size * (workload.config.hidden_dropout_prob > 0)
    final_norm = layer.input if workload.config.layer_norm_placement == "pre" else 0.0
    held_by: dict[int, float] = {}
    for stage in stages:
        held_by[stage.number] = len(stage.part.layers) * layer.kept + (mask if stage.part.first else 0.0)
        if stage.part.last:
            held_by[stage.number] += head.kept + final_norm
    last = max((stage.number for stage in stages if stage.part.last), default=-1)
    queued_by = {stage.number: len(stage.part.layers) * layer.queued for stage in stages}
    # While a split backward pass goes down a stage, layers drop what they kept and queue what is left for later.
    grown_by = {stage.number: (len(stage.part.layers) - 1) * max(0.0, layer.queued - layer.kept) for stage in stages}
    if last in queued_by:
        queued_by[last] += head.queued
    best: tuple[float, dict[Part, float]] = (0.0, {})
    for moment in moments:
        own_logits = head.logits if moment.stage == last else 0.0
        transient = own_logits * 1.5
        if not moment.forward:
            transient = layer.repeated + layer.transient + grown_by[moment.stage]
            if moment.stage == last:  # what the heads kept is gone when the layers' turn comes
                transient = max(head.transient, head.queued + transient - own_logits - head.kept - final_norm)
        messages = moment.messages * layer.input
        held = sum(count * held_by[stage] for stage, count in moment.held)
        candidate: dict[Part, float] = {
            "activations": held + sum(count * queued_by[stage] for stage, count in moment.queued),
            "logits": head.logits * dict(moment.held).get(last, 0),
            "temporaries": max(transient, 0.0) + messages,
        }
        total = math.fsum(candidate.values())
        if total > best[0]:
            best = total, candidate
    return best[1]


class Moment(NamedTuple):
    """An action of a rank, and what it holds then.

    Attributes:
        stage: of the action.
        forward: or else backward.
        held: micro batches in flight of each stage.
        queued: micro batches of each stage whose weight gradients are still to come.
        messages: one that the next action is to receive, and the last one's that may not have been taken yet.
    """

    stage: int
    forward: bool
    held: tuple[tuple[int, int], ...]
    queued: tuple[tuple[int, int], ...]
    messages: int


@lru_cache(maxsize=4096)
def _moments(name: str, ranks: int, microbatches: int, chunks: int, rank: int) -> tuple[Moment, ...]:
    """The different moments of a rank in a step."""
    held: Counter[int] = Counter()
    queued: Counter[int] = Counter()
    found: dict[Moment, None] = {}
    schedule = schedule_of(name, ranks, microbatches, chunks)
    actions = schedule.actions[rank]
    for before, action, after in zip((None, *actions), actions, (*actions[1:], None), strict=False):
        if action.kind is ActionKind.BACKWARD_WEIGHT:
            queued[action.stage] -= 1
            continue
        forward = action.kind is ActionKind.FORWARD
        held[action.stage] += forward
        messages = (before is not None and outgoing(schedule, before) is not None) + (
            after is not None and incoming(schedule, after) is not None
        )
        found[Moment(action.stage, forward, tuple(sorted(held.items())), tuple(sorted(queued.items())), messages)] = (
            None
        )
        held[action.stage] -= not forward
        queued[action.stage] += action.kind is ActionKind.BACKWARD_INPUT
    return tuple(found)
