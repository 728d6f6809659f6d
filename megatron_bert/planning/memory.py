# SPDX-License-Identifier: Apache-2.0
"""Memory of a rank by part, in closed form; its states are those of ZeRO (Rajbhandari et al., arXiv 1910.02054)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megatron_bert.config import RunSettings
from megatron_bert.planning.kept import final_norm, head_tensors, kept_by_stage, layer_tensors
from megatron_bert.planning.layouts import Layout, Stage, schedule_of
from megatron_bert.planning.measuring import Part
from megatron_bert.planning.workload import Workload
from parallel.pipeline.actions import ActionKind
from parallel.pipeline.communication import incoming, outgoing
from parallel.pipeline.schedules import round_sizes


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


#: Rounds of equal size after which one more adds no moment: micro batches of at most three are in flight at once.
_DISTINCT_ROUNDS = 3


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


# ---------------------------------------------------------------- a rank


def rank_memory(workload: Workload, layout: Layout, stages: list[Stage], rank: int = 0) -> RankMemory:
    """Memory of a rank at its peak: states, what micro batches in flight keep, and the most expensive backward pass.

    Args:
        stages: of the layout, all of them.
        rank: place in the pipeline.
    """
    few = fewest_alike(workload, layout)
    mine = [stages[number] for number in layout.stages_of(rank)]
    moments = fullest_moments(layout.schedule, layout.pipeline, few, layout.chunks, rank, layout.flat)
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
        if left and not layout.splits_backward:
            layer = layer_tensors(workload, layout)
            ends = layer.output + max(product, number * stage.layer_size - product - gone)
            gradients += max(ends, layer.intermediate + product, layer.transient) - layer.transient
        gradients += of_heads
    if done:
        gradients += 4.0 * stage.layer_size * (1 + done / stage.shards)
        gradients -= 4.0 * done * stage.layer_count if stage.number in ended else 0.0
        gradients += 0.0 if left else 4.0 * stage.root_count
    return {"buffers": buffers, "gradients": gradients}


def _in_graphs(
    workload: Workload, layout: Layout, stages: list[Stage], moments: tuple[Moment, ...]
) -> dict[Part, float]:
    """Of CUDA graphs: every slot of a stage has memory of its own, and what ends a backward pass shares some.

    See :class:`~parallel.pipeline.captured_passes.CapturedPasses`.
    """
    layer, head, number = layer_tensors(workload, layout), head_tensors(workload, layout), workload.number_bytes
    tokens = number * workload.tokens(layout.micro_batch, layout.split_tokens)
    wide = workload.config.intermediate_size / layout.tensor
    kept, split = kept_by_stage(workload, layout, stages), layout.splits_backward
    parts: dict[Part, float] = {"activations": 0.0, "logits": 0.0, "temporaries": 0.0}
    shared = 0.0
    for stage in stages:
        own, last = kept[stage.number], stage.part.last
        slots = max(dict(m.held).get(stage.number, 0) + dict(m.queued).get(stage.number, 0) for m in moments)
        # What a forward pass drops again: hashes of dropout, and wide tensors that are computed again.
        hashes = layer.input * (4 if workload.config.hidden_dropout_prob > 0 else 2)
        forward = {"none": hashes, "selective": max(hashes, tokens * wide), "full": layer.dropped}[layout.recompute]
        backward = layer.repeated + layer.transient + own.grown
        if last:  # layers are through before there is anything of the heads
            layers = forward - head.logits - head.kept - final_norm(workload, layer)
            forward, backward = max(layers, head.logits * 1.5), max(head.transient, backward)
        # What the stage sends in both directions, and the gradient that it is given.
        places = layer.input * (2 * (not last) + (not stage.part.first))
        parts["activations"] += slots * (own.held + places)
        parts["logits"] += slots * head.logits if last else 0.0
        parts["temporaries"] += slots * (max(forward, backward) if split else forward)
        shared = max(shared, number * wide * workload.config.hidden_size if split else backward)
    parts["temporaries"] += shared + max(moment.messages for moment in moments) * layer.input
    return parts


def _in_flight(
    workload: Workload, layout: Layout, stages: list[Stage], moments: tuple[Moment, ...]
) -> dict[Part, float]:
    if workload.graphs and layout.flat:
        return _in_graphs(workload, layout, stages, moments)
    layer, head = layer_tensors(workload, layout), head_tensors(workload, layout)
    kept, norm = kept_by_stage(workload, layout, stages), final_norm(workload, layer)
    by_number = {stage.number: stage for stage in stages}
    best: tuple[float, dict[Part, float]] = (0.0, {})
    for moment in moments:
        stage = by_number[moment.stage]
        layers, of_heads = len(stage.part.layers), head.kept + norm if stage.part.last else 0.0
        own_logits = head.logits if stage.part.last else 0.0
        transient = max(own_logits * 1.5, layer.dropped - own_logits - of_heads)
        if not moment.forward:
            own = kept[moment.stage]
            transient = layer.repeated + layer.transient + own.grown + own.table
            if stage.part.last:  # what the heads kept is gone when the layers' turn comes
                transient = max(head.transient, head.queued + transient - own_logits - of_heads)
            transient = max(transient, own.ended - own.held - own_logits)
        held = sum(count * kept[number].held for number, count in moment.held)
        candidate: dict[Part, float] = {
            "activations": held + sum(count * kept[number].queued for number, count in moment.queued),
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


def fewest_alike(workload: Workload, layout: Layout) -> int:
    """How few micro batches have the moments of a step's.

    Of the rounds in which micro batches go through the chunks, some may have one more than the others: some of each
    stay. GPipe has no rounds.
    """
    microbatches = layout.microbatches(workload)
    if layout.schedule == "gpipe":
        return microbatches
    size, count, larger = round_sizes(layout.pipeline, microbatches)
    return min(larger, _DISTINCT_ROUNDS) * (size + 1) + min(count - larger, _DISTINCT_ROUNDS) * size


@lru_cache(maxsize=4096)
def fullest_moments(name: str, ranks: int, microbatches: int, chunks: int, rank: int, flat: bool) -> tuple[Moment, ...]:
    """The moments of a rank in a step, without those at which it holds no more of anything than at one alike.

    Args:
        flat: whether gradients are all there from the beginning, so that moments differ in no more than their action.
    """
    alike: dict[tuple[object, ...], list[Moment]] = {}
    for moment in _moments(name, ranks, microbatches, chunks, rank):
        gradients = () if flat else (moment.last, moment.ended)
        others = alike.setdefault((moment.stage, moment.forward, *gradients), [])
        if not any(holds_all_of(other, moment) for other in others):
            others[:] = [*(other for other in others if not holds_all_of(moment, other)), moment]
    return tuple(moment for others in alike.values() for moment in others)


def holds_all_of(more: Moment, less: Moment) -> bool:
    """Whether one moment has at least as much as the other of every stage, and as many messages."""
    held, queued = dict(more.held), dict(more.queued)
    return (
        more.messages >= less.messages
        and all(held.get(stage, 0) >= count for stage, count in less.held)
        and all(queued.get(stage, 0) >= count for stage, count in less.queued)
    )


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
