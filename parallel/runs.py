# SPDX-License-Identifier: Apache-2.0
"""Neighboring parameters in memory, which an optimizer updates together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from parallel.gradients import raw_local
from parallel.mesh import ParallelMesh
from parallel.parts import Part, Region, Sizes


@dataclass(frozen=True, eq=False)
class Member:
    """What this rank updates of one parameter.

    Attributes:
        shape: of the whole parameter.
        start: of its values in those of the run, flat.
        count: of values.
        regions: blocks of the parameter that they are.
    """

    shape: Sizes
    start: int
    count: int
    regions: tuple[Region, ...]


@dataclass(frozen=True, eq=False)
class Run:
    """Parameters that are neighbors in memory and of one kind.

    Attributes:
        values: float32 master weights of this rank.
        members: of the run, by parameter.
        kind: what they have in common, as the optimizer sees it.
        axes: of a (tensor x data) plane of ranks, over which the values are copied.
        buffer: of their gradients; None where each parameter holds its own.
    """

    values: Tensor
    members: Mapping[nn.Parameter, Member]
    kind: Any
    axes: frozenset[str]
    buffer: Tensor | None

    @property
    def gradient(self) -> Tensor | None:
        """Of this rank's values, summed over data ranks; None where no backward pass has reached them."""
        if self.buffer is not None:
            return self.buffer
        (parameter,) = self.members
        return None if parameter.grad is None else raw_local(parameter.grad)

    def own(self, parameter: nn.Parameter, values: Tensor) -> Tensor:
        """The values of a member, flat, in a tensor like those of the run."""
        member = self.members[parameter]
        return values.reshape(-1)[member.start : member.start + member.count]

    def part(self, parameter: nn.Parameter, values: Tensor) -> Part:
        """A member's part of a tensor like those of the run."""
        member = self.members[parameter]
        own = values if values.dim() != 1 else self.own(parameter, values)
        return Part(member.shape, own, member.regions, self.axes)

    def counted_here(self, mesh: ParallelMesh) -> bool:
        """Whether this rank's values stand for their copies on other ranks: exactly one rank of a plane says so."""
        return all(mesh.coordinate[axis] == 0 for axis in self.axes)


def lone_run(parameter: nn.Parameter, kind: Any = None) -> Run:
    """The run of a parameter, plain or a DTensor, that holds values and gradient itself."""
    part = Part.of(parameter)
    member = Member(part.shape, 0, part.values.numel(), part.regions)
    return Run(part.values, {parameter: member}, kind, part.axes, None)
