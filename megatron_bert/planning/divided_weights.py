# SPDX-License-Identifier: Apache-2.0
"""What FSDP2 does besides its messages where data ranks divide weights: copies in memory, and work of the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_bert.planning.fullest import most
from megatron_bert.planning.layouts import Layout, Stage
from megatron_bert.planning.machine import Machine
from megatron_bert.planning.workload import Workload

#: That the host starts for a gather of weights, and for a sum of gradients and the update behind it: as many as take as
#: long, for most of it is Python. Measured in steps of a run on a processor, see benchmarks/README.md.
GATHER_OPERATORS, REDUCE_OPERATORS = 140, 120


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered, and whose gradients are summed, at once: a layer's, or those outside of layers.

    Attributes:
        size: elements of a tensor rank, with what fills up the first dimension of each.
        count: the same without.
        number: bytes of an element in the format of the computation.
        shards: data ranks that divide it.
    """

    size: int
    count: int
    number: int
    shards: int

    @property
    def sent_bytes(self) -> float:
        """Read and written to lay a rank's own part out for a gather: float32 is cast, and all is copied."""
        own = self.size / self.shards
        cast = own * (4 + self.number) if self.number != 4 else 0.0
        return cast + 2 * own * self.number

    @property
    def received_bytes(self) -> float:
        """Read and written to copy parameters from what was gathered, in which those of each rank are together."""
        return 2.0 * self.size * self.number

    def summed_bytes(self, microbatches: int) -> float:
        """Read and written to lay gradients out for their sum over data ranks, in float32.

        Those of several micro batches were added up in float32 before.
        """
        return float(self.count * (self.number if microbatches == 1 else 4) + self.size * 4)


def added_bytes(workload: Workload, layout: Layout) -> float:
    """Read and written of each weight to add its gradient to those in float32, on average of micro batches.

    Flat buffers have each added; FSDP2 keeps that of the first micro batch, or a cast of it if others follow.
    """
    number, microbatches = workload.number_bytes, layout.microbatches(workload)
    if layout.flat:
        return number + 8
    first = 4 + number if microbatches > 1 and number != 4 else 0
    return (first + (microbatches - 1) * (number + 8)) / microbatches


def layer_unit(stage: Stage, number: int) -> Unit:
    """A layer of a stage, computed in a format of so many bytes."""
    return Unit(stage.layer_size, stage.layer_count, number, stage.shards)


def root_unit(stage: Stage, number: int) -> Unit:
    """What a stage has outside of layers; without elements where there is nothing."""
    return Unit(stage.root_size, stage.root_count, number, stage.shards)


def units(stage: Stage, number: int) -> Iterator[Unit]:
    """All of a stage."""
    yield from (layer_unit(stage, number) for _ in stage.part.layers)
    if stage.root_count:
        yield root_unit(stage, number)


class Gathering(NamedTuple):
    """What it takes to gather weights that data ranks divide.

    Attributes:
        sending: seconds until they are there, beside which a GPU computes.
        receiving: seconds to copy them to where they are computed with, beside which it does not.
        operators: that the host starts.
    """

    sending: float = 0.0
    receiving: float = 0.0
    operators: int = 0


def gathering_of(unit: Unit, layout: Layout, machine: Machine) -> Gathering:
    """Of a unit; nothing where weights stay whole."""
    if layout.flat or not unit.size:
        return Gathering()
    link = machine.link(layout, "data_shard")
    message = machine.message("all-gather", unit.size * unit.number, unit.shards, link)
    return Gathering(message + machine.moving(unit.sent_bytes), machine.moving(unit.received_bytes), GATHER_OPERATORS)


def laying_out(workload: Workload, layout: Layout, stages: list[Stage], machine: Machine) -> float:
    """Seconds to lay gradients out for their sums over data ranks, where these divide weights, with the host's part."""
    if layout.flat:
        return 0.0
    microbatches = layout.microbatches(workload)
    operators = 0 if machine.device.asynchronous else REDUCE_OPERATORS  # the host of a GPU is ahead of it

    def cost(stage: Stage) -> float:
        found = units(stage, workload.number_bytes)
        return sum(machine.with_host(machine.moving(unit.summed_bytes(microbatches)), operators) for unit in found)

    return most(layout, stages, cost)
