# SPDX-License-Identifier: Apache-2.0
"""The ways in which a workload can be laid out over a number of ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_bert.planning.parameters import GROUP_PARAMETERS, WORDS, Parameter, StageParameters, stage_parameters
from megatron_bert.planning.workload import Workload
from parallel.mesh import Sharding
from parallel.pipeline.actions import Backward, Schedule
from parallel.pipeline.schedules import MOST_PASSES, SCHEDULES, build_schedule
from parallel.pipeline.stage import StagePart
from parallel.recompute import Recompute

#: Elements that parameters of flat buffers begin at multiples of; see :mod:`parallel.flat_buffers`.
ALIGNMENT = 64
#: What a search tries: hybrid sharding has a size to choose, which depends on the machine.
RECOMPUTATIONS: tuple[Recompute, ...] = ("none", "selective", "full")
SHARDINGS: tuple[Sharding, ...] = ("none", "optimizer", "full")
#: Sizes of a micro batch that a search tries for a number of data ranks: the largest, and the most of them.
_LARGEST_MICRO_BATCH, _MOST_MICRO_BATCHES = 256, 12


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is laid out: what its settings say, resolved.

    Attributes:
        tensor, pipeline, data: ranks of the axes.
        sequence: whether tensor ranks divide tokens.
        chunks: stages a pipeline rank.
        micro_batch: samples of a forward pass.
        recompute: what the backward pass computes again.
        sharding: what data ranks divide.
        shard_size: ranks of a shard group, for hybrid sharding.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    schedule: str = "1f1b"
    chunks: int = 1
    micro_batch: int = 1
    recompute: Recompute = "none"
    sharding: Sharding = "none"
    shard_size: int | None = None

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.tensor * self.pipeline * self.data

    @property
    def shards(self) -> int:
        """Data ranks that share one copy of what is divided."""
        if self.sharding == "none":
            return 1
        return self.shard_size or self.data if self.sharding == "hybrid" else self.data

    @property
    def flat(self) -> bool:
        """Whether weights stay whole on every rank, in flat buffers."""
        return self.data == 1 or self.sharding in ("none", "optimizer")

    @property
    def split_tokens(self) -> int:
        """Ranks that divide the tokens between matrix products."""
        return self.tensor if self.sequence else 1

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients are actions of their own."""
        return SCHEDULES[self.schedule].backward is Backward.SPLIT

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank of the pipeline holds, by chunk."""
        return SCHEDULES[self.schedule].placement.stages(rank, self.pipeline, self.chunks)

    def microbatches(self, workload: Workload) -> int:
        """Of a step on each data rank."""
        return workload.global_batch // (self.micro_batch * self.data)


@lru_cache(maxsize=4096)
def schedule_of(name: str, ranks: int, microbatches: int, chunks: int) -> Schedule:
    """The schedule, built once."""
    return build_schedule(name, ranks, microbatches, chunks)


@dataclass(frozen=True)
class Bucket:
    """Neighboring parameters of a flat buffer, communicated at once.

    Attributes:
        places: each parameter with its first element in the bucket.
        size: elements, with what fills it up.
    """

    places: tuple[tuple[Parameter, int], ...]
    size: int

    def own_share(self, tensor: int, shards: int, rank: int, names: frozenset[str]) -> int:
        """Elements of some parameters in the range of a data rank."""
        place = rank % shards
        low, high = place * self.size // shards, (place + 1) * self.size // shards
        return sum(
            max(0, min(start + parameter.local(tensor), high) - max(start, low))
            for parameter, start in self.places
            if parameter.name in names
        )


@dataclass(frozen=True)
class Stage:
    """A stage in a layout; the same for all micro batches, schedules and recomputations.

    Attributes:
        part: what it holds of the model.
        alone: whether its word embeddings have a copy on another stage.
        tensor: ranks that divide its matrices.
        shards: data ranks that share one copy of what is divided.
        flat: whether weights stay whole, in flat buffers.
    """

    number: int
    part: StagePart
    parameters: StageParameters
    alone: bool
    tensor: int
    shards: int
    flat: bool

    @cached_property
    def kind(self) -> tuple[int, bool, bool]:
        """Layers, and whether it has the embeddings and the heads: stages of a kind hold and cost the same."""
        return len(self.part.layers), self.part.first, self.part.last

    @cached_property
    def count(self) -> int:
        """Parameters of a tensor rank."""
        return self.root_count + len(self.part.layers) * self.layer_count

    @cached_property
    def root_count(self) -> int:
        """Of these, those outside of layers."""
        return sum(parameter.local(self.tensor) for parameter in self.parameters.root)

    @cached_property
    def layer_count(self) -> int:
        """Of these, those of a layer."""
        return sum(parameter.local(self.tensor) for parameter in self.parameters.layers[0])

    @cached_property
    def layer_size(self) -> int:
        """The same with what FSDP2 fills them up with."""
        return sum(padded(parameter, self.tensor, self.shards) for parameter in self.parameters.layers[0])

    @cached_property
    def root_size(self) -> int:
        """Elements outside of layers, with what FSDP2 fills them up with."""
        return sum(padded(parameter, self.tensor, self.shards) for parameter in self.parameters.root)

    @cached_property
    def flat_size(self) -> int:
        """Elements of the flat buffers."""
        return sum(bucket.size for bucket in self.buckets)

    @cached_property
    def share(self) -> float:
        """Elements on one of the ranks among which FSDP2 divides parameters."""
        return (len(self.part.layers) * self.layer_size + self.root_size) / self.shards

    @cached_property
    def groups(self) -> list[tuple[tuple[Parameter, ...], ...]]:
        """Layers whose parameters are communicated together from flat buffers."""
        groups: list[list[tuple[Parameter, ...]]] = []
        size = GROUP_PARAMETERS
        for layer in self.parameters.layers:
            if size >= GROUP_PARAMETERS:
                groups.append([])
                size = 0
            groups[-1].append(layer)
            size += sum(math.prod(parameter.shape) for parameter in layer)
        return [tuple(group) for group in groups]

    @cached_property
    def unit_sizes(self) -> list[tuple[int, int]]:
        """Elements of what FSDP2 gathers at once, as it fills them up, and how often it does for a micro batch."""
        # For the forward and for the backward pass; the root, which stays gathered between the two, once.
        root = [(self.root_size, 1)] if self.root_size else []
        return [(self.layer_size, 2)] * len(self.part.layers) + root

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Of the flat buffers."""
        root = list(self.parameters.root)
        found = [[p] for p in root if p.name == WORDS and self.alone]
        found.append([p for p in root if not (p.name == WORDS and self.alone)])
        found += [[p for layer in group for p in layer] for group in self.groups]
        return [self._packed(bucket) for bucket in found if bucket]

    def _packed(self, parameters: list[Parameter]) -> Bucket:
        tensor = self.tensor
        places, end = [], 0
        for parameter in sorted(
            parameters, key=lambda p: (not (tensor > 1 and p.divided is not None), len(p.shape) < 2)
        ):
            places.append((parameter, end))
            end += _up(parameter.local(tensor), ALIGNMENT)
        return Bucket(tuple(places), _up(end, ALIGNMENT * self.shards))


def padded(parameter: Parameter, tensor: int, shards: int) -> int:
    """Elements of a tensor rank's part of a parameter with what FSDP2 fills its first dimension up with."""
    rows, *rest = parameter.local_shape(tensor)
    return -(-rows // shards) * shards * math.prod(rest)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def stages_of(workload: Workload, layout: Layout, sizes: list[int] | None = None) -> list[Stage]:
    """The stages of a layout, all of them.

    Raises:
        UserError: more stages than layers, or sizes that do not fit.
    """
    count = layout.pipeline * layout.chunks
    return [
        Stage(
            number,
            part,
            stage_parameters(workload.config, part, head=workload.head),
            workload.pretraining and count > 1 and (part.first or part.last),
            layout.tensor,
            layout.shards,
            layout.flat,
        )
        for number, part in enumerate(workload.stage_parts(count, sizes))
    ]


def why_not(workload: Workload, layout: Layout) -> str | None:
    """Why a layout cannot be, by the rules of the settings; None for one that can."""
    config, compiled = workload.config, workload.compiled
    for name, size in (
        ("heads", config.num_attention_heads),
        ("features of the MLP", config.intermediate_size),
        ("rows of the vocabulary", config.padded_vocab_size),
    ):
        if size % layout.tensor:
            return f"tensor {layout.tensor} does not divide the {size} {name}"
    tokens = workload.tokens(layout.micro_batch, layout.split_tokens)
    if layout.sequence and tokens % layout.tensor:
        return f"tensor {layout.tensor} does not divide the {tokens} tokens"
    if workload.global_batch % (layout.micro_batch * layout.data):
        return f"data {layout.data} x micro batch {layout.micro_batch} does not divide {workload.global_batch} samples"
    if layout.pipeline * layout.chunks > config.num_hidden_layers:
        return f"{layout.pipeline * layout.chunks} stages are more than the {config.num_hidden_layers} layers"
    if layout.pipeline * layout.chunks * layout.microbatches(workload) > MOST_PASSES:
        return f"{layout.microbatches(workload):,} micro batches are more than a step can have"
    if layout.splits_backward and compiled:
        return f"schedule {layout.schedule} cannot run compiled layers"
    if workload.graphs and not layout.flat:
        return f"sharding {layout.sharding} frees gathered weights in every pass, which CUDA graphs cannot"
    if workload.graphs and layout.recompute == "full" and config.attention_probs_dropout_prob > 0:
        return "attention with dropout cannot be computed again in CUDA graphs"
    return None


def layouts(workload: Workload, ranks: int, micro_batch: int = 1) -> Iterator[Layout]:
    """Every way to lay a workload out over a number of ranks, those that cannot be included.

    Args:
        micro_batch: the configured size, whose multiples by powers of two are tried where there are too many.
    """
    config = workload.config
    for tensor in _divisors(ranks, 16):
        for pipeline in _divisors(ranks // tensor, config.num_hidden_layers):
            data = ranks // tensor // pipeline
            share, rest = divmod(workload.global_batch, data)
            micro = [1] if rest else _micro_batches(share, micro_batch)
            choices = itertools.product(
                _schedules(pipeline, config.num_hidden_layers),
                (False, True) if tensor > 1 else (False,),
                RECOMPUTATIONS,
                SHARDINGS if data > 1 else SHARDINGS[:1],
                micro,
            )
            for (schedule, chunks), sequence, recompute, sharding, size in choices:
                yield Layout(
                    tensor=tensor,
                    pipeline=pipeline,
                    data=data,
                    sequence=sequence,
                    schedule=schedule,
                    chunks=chunks,
                    micro_batch=size,
                    recompute=recompute,
                    sharding=sharding,
                )


def _schedules(pipeline: int, layers: int) -> Iterator[tuple[str, int]]:
    if pipeline == 1:
        yield "1f1b", 1
        return
    for name, kind in SCHEDULES.items():
        least, most = kind.chunks
        for chunks in range(least, (most or 4) + 1):
            if pipeline * chunks <= layers and name != "gpipe":
                yield name, chunks


def _micro_batches(share: int, configured: int) -> list[int]:
    """Sizes that divide the samples of a data rank.

    Of too many, powers of two, the configured size times such, and the largest size before each next power of two.
    """
    sizes = _divisors(share, _LARGEST_MICRO_BATCH)
    if len(sizes) <= _MOST_MICRO_BATCHES:
        return sizes
    largest = {size.bit_length(): size for size in sizes}.values()
    return [size for size in sizes if _odd_part(size) in (1, _odd_part(configured)) or size in largest]


def _odd_part(number: int) -> int:
    return number // (number & -number)


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]
