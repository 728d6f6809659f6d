# SPDX-License-Identifier: Apache-2.0
"""Memory of a rank by part, in closed form.

Activations of a layer follow Korthikanti et al., arXiv 2205.05198, table 2, with fused attention: for T tokens on a
rank, h features and t tensor ranks in two-byte numbers ``T h (10 + 24 / t)``, or ``34 T h / t`` under sequence
parallelism, of which 2 are masks of dropout. States are those of ZeRO (Rajbhandari et al., arXiv 1910.02054).
"""

from __future__ import annotations

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
    attention += _scores(workload, tensor, tokens, recompute == "selective")
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


def _scores(workload: Workload, tensor: int, tokens: float, selective: bool) -> float:
    """Where attention is not fused: softmax in float32 and what dropout leaves of it, and where samples share rows."""
    number, dropout = workload.number_bytes, workload.config.attention_probs_dropout_prob > 0
    if workload.fused_attention and workload.rows and number == 4:
        # No kernel takes packed sequences in float32: rows are put in order, and given a mask.
        return number * tokens * (4 * workload.config.hidden_size / tensor + workload.length)
    if selective or not workload.writes_scores:
        return 0.0
    return workload.config.num_attention_heads / tensor * workload.length * tokens * (4 + number + dropout)


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
        stages: of the layout, all of them.
        rank: place in the pipeline.
    """
    microbatches = layout.microbatches(workload)
    # A rank holds at most all of a few micro batches more than there are ranks, whatever their number.
    few = min(microbatches, MOST_IN_FLIGHT * layout.pipeline) if layout.schedule != "gpipe" else microbatches
    kind = SCHEDULES[layout.schedule]
    mine = [stages[number] for number in kind.placement.stages(rank, layout.pipeline, layout.chunks)]
    moments = _moments(layout.schedule, layout.pipeline, few, layout.chunks, rank)
    parts = _states(workload, layout, mine) | _in_flight(workload, layout, mine, moments)
    building = 4.0 * sum(stage.count for stage in mine)
    if layout.flat:
        building += parts["weights"] + (0.0 if workload.number_bytes == 4 else parts["weights"] * 2 / layout.shards)
    return RankMemory(parts, building)


def _states(workload: Workload, layout: Layout, stages: list[Stage]) -> dict[Part, float]:
    """What is there all through a step."""
    if layout.flat:
        each = FLAT_STATES[workload.number_bytes]
        count = sum(stage.flat_size for stage in stages)
        return {
            "weights": each.weights * count,
            "gradients": each.gradients * count,
            "optimizer": each.optimizer * count / layout.shards,
            "buffers": 0.0,
        }
    share = sum(stage.share for stage in stages)
    return {"weights": 4.0 * share, "optimizer": 8.0 * share}


def _divided(
    workload: Workload, layout: Layout, stages: list[Stage], stage: Stage, moment: Moment, done: int
) -> dict[Part, float]:
    """Of weights that data ranks divide: those that are gathered, and gradients.

    Gathered are the root, a layer and the next one. Gradients are of a layer in the format of the computation; those of
    several micro batches add up whole in float32, until they are summed over the data ranks a layer at a time, each as
    long as it takes to the next one.

    Args:
        stage: of the moment.
        done: its layers that are through with the last backward pass.
    """
    number, wide = workload.number_bytes, workload.config.intermediate_size // layout.tensor
    left = len(stage.part.layers) - done
    buffers = number * (sum(one.root_count for one in stages) + min(2, left) * stage.layer_size)
    ended = dict(moment.ended)
    gradients = 4.0 * sum((one.share if ended[one.number] else one.count) for one in stages if one.number in ended)
    if not moment.forward:
        of_heads = number * stage.root_count if stage.part.last or not left else 0.0
        product = number * wide * workload.config.hidden_size
        # All gradients of a layer are there when most of what it kept has gone.
        tokens = number * workload.tokens(layout.micro_batch, layout.split_tokens)
        gone = tokens * (3 * wide + (1 - 4 / layout.tensor) * workload.config.hidden_size)
        own = max(product, number * stage.layer_size - product - gone) if left and not layout.splits_backward else 0.0
        gradients += of_heads + own
    if done:
        gradients += 4.0 * stage.layer_size * (1 + done / stage.shards)
        gradients -= 4.0 * done * stage.layer_count if stage.number in ended else 0.0
        gradients += 0.0 if left else 4.0 * stage.root_count
    return {"buffers": buffers, "gradients": gradients}


def _in_flight(
    workload: Workload, layout: Layout, stages: list[Stage], moments: tuple[Moment, ...]
) -> dict[Part, float]:
    layer, head = layer_tensors(workload, layout), head_tensors(workload, layout)
    tokens = workload.tokens(layout.micro_batch, layout.split_tokens)
    mask = tokens / layout.split_tokens * workload.config.hidden_size * (workload.config.hidden_dropout_prob > 0)
    final_norm = layer.input if workload.config.layer_norm_placement == "pre" else 0.0
    by_number = {stage.number: stage for stage in stages}
    held_by = {
        number: len(stage.part.layers) * layer.kept
        + (mask if stage.part.first else 0.0)
        + (head.kept + final_norm if stage.part.last else 0.0)
        for number, stage in by_number.items()
    }
    queued_by = {
        number: len(stage.part.layers) * layer.queued + (head.queued if stage.part.last else 0.0)
        for number, stage in by_number.items()
    }
    best: tuple[float, dict[Part, float]] = (0.0, {})
    for moment in moments:
        stage = by_number[moment.stage]
        layers, of_heads = len(stage.part.layers), head.kept + final_norm if stage.part.last else 0.0
        own_logits = head.logits if stage.part.last else 0.0
        transient = own_logits * 1.5
        if not moment.forward:
            # While a split backward pass goes down a stage, layers drop what they kept and queue what is left.
            grown = (layers - 1) * max(0.0, layer.queued - layer.kept)
            transient = layer.repeated + layer.transient + grown
            if stage.part.last:  # what the heads kept is gone when the layers' turn comes
                transient = max(head.transient, head.queued + transient - own_logits - of_heads)
        held = sum(count * held_by[number] for number, count in moment.held)
        candidate: dict[Part, float] = {
            "activations": held + sum(count * queued_by[number] for number, count in moment.queued),
            "logits": head.logits * sum(count for number, count in moment.held if by_number[number].part.last),
            "temporaries": max(transient, 0.0) + moment.messages * layer.input,
        }
        if layout.flat:
            if (total := sum(candidate.values())) > best[0]:
                best = total, candidate
            continue
        for done in {0, 1, layers - 2, layers - 1, layers} if moment.last else {0}:
            if 0 <= done <= layers:
                later = candidate | _divided(workload, layout, stages, stage, moment, done)
                later["activations"] -= done * layer.kept
                if done:
                    later["logits"] -= own_logits
                    later["activations"] -= of_heads
                    later["temporaries"] = layer.repeated + layer.transient if done < layers else 0.0
                if (total := sum(later.values())) > best[0]:
                    best = total, later
    return best[1]


class Moment(NamedTuple):
    """An action of a rank, and what it holds then.

    Attributes:
        stage: of the action.
        forward: or else backward.
        last: whether data ranks sum gradients in it that they divide.
        held: micro batches in flight of each stage.
        queued: micro batches of each stage whose weight gradients are still to come.
        ended: stages of which backward passes are through, and whether all are.
        messages: one that the next action is to receive, and the last one's that may not have been taken yet.
    """

    stage: int
    forward: bool
    last: bool
    held: tuple[tuple[int, int], ...]
    queued: tuple[tuple[int, int], ...]
    ended: tuple[tuple[int, bool], ...]
    messages: int


@lru_cache(maxsize=4096)
def _moments(name: str, ranks: int, microbatches: int, chunks: int, rank: int) -> tuple[Moment, ...]:
    """The different moments of a rank in a step."""
    held: Counter[int] = Counter()
    queued: Counter[int] = Counter()
    ended: Counter[int] = Counter()
    found: dict[Moment, None] = {}
    schedule = schedule_of(name, ranks, microbatches, chunks)
    actions = schedule.actions[rank]
    for before, action, after in zip((None, *actions), actions, (*actions[1:], None), strict=False):
        stage, kind = action.stage, action.kind
        if kind is ActionKind.BACKWARD_WEIGHT:
            queued[stage] -= 1
            ended[stage] += 1
            continue
        held[stage] += kind is ActionKind.FORWARD
        moment = Moment(
            stage=stage,
            forward=kind is ActionKind.FORWARD,
            last=kind is ActionKind.BACKWARD and ended[stage] == microbatches - 1,
            held=tuple(sorted(held.items())),
            queued=tuple(sorted(queued.items())),
            ended=tuple((number, count == microbatches) for number, count in sorted(ended.items()) if count),
            messages=(before is not None and outgoing(schedule, before) is not None)
            + (after is not None and incoming(schedule, after) is not None),
        )
        found[moment] = None
        held[stage] -= kind is not ActionKind.FORWARD
        queued[stage] += kind is ActionKind.BACKWARD_INPUT
        ended[stage] += kind is ActionKind.BACKWARD
    return tuple(found)
