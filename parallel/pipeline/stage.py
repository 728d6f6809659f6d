# SPDX-License-Identifier: Apache-2.0
"""What a pipeline runs, and dividing a stack of layers into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from parallel.errors import ArgumentError, UserError
from parallel.mesh import TensorParallel


@dataclass(frozen=True)
class StagePart:
    """What one stage holds of the model.

    Attributes:
        layers: global numbers of its layers.
        first: whether it holds what comes before the layers.
        last: whether it holds what comes after them.
    """

    layers: range
    first: bool
    last: bool


class Stage(Protocol):
    """What a pipeline runs: one part of a model, as a module.

    Attributes:
        part: which part it is.
        tp: the ranks that share its matrices. Under sequence parallelism each of them gives the next stage its tokens.
    """

    part: StagePart
    tp: TensorParallel

    def __call__(self, batch: Any, seed: int | None, received: Tensor | None, /) -> Any:
        """The model's output on the last stage, and what the next stage receives on others.

        Args:
            batch: the whole micro batch, on every stage.
            seed: of the run's dropout masks; None switches dropout off.
            received: from the stage before; None on the first.
        """


def split_layers(
    layers: int, stages: int, *, last_cost: float = 0.0, sizes: Sequence[int] | None = None
) -> list[StagePart]:
    """Divide layers over stages so that the most expensive stage is as cheap as can be.

    Args:
        stages: number of stages, at most one per layer.
        last_cost: cost of what the last stage holds besides layers, in layers.
        sizes: layers of each stage, to divide by hand.

    Raises:
        UserError: more stages than layers, or sizes that do not fit.
    """
    if stages > layers:
        raise UserError(
            f"{layers} layers cannot be divided over {stages} pipeline stages (pipeline ranks x virtual stages): "
            "every stage needs a layer; use fewer stages"
        )
    if sizes is None:
        sizes = _balanced_sizes(layers, stages, last_cost)
    elif len(sizes) != stages or sum(sizes) != layers or min(sizes) < 1:
        raise ArgumentError(
            f"$sizes {list(sizes)} does not fit: give {stages} numbers of 1 or more, one per stage, "
            f"that add up to the {layers} layers"
        )
    starts = [sum(sizes[:stage]) for stage in range(stages + 1)]
    return [
        StagePart(range(starts[stage], starts[stage + 1]), first=stage == 0, last=stage == stages - 1)
        for stage in range(stages)
    ]


def _balanced_sizes(layers: int, stages: int, last_cost: float) -> list[int]:
    """Hand out one layer at a time to the stage that is cheapest so far.

    Optimal, since all layers cost the same: a stage gets its n-th layer only when every other stage would cost at
    least as much with one more. Ties go to the stage nearest to the middle, away from embedding and head.
    """
    sizes = [1] * stages
    extra = [0.0] * (stages - 1) + [last_cost]
    middle = (stages - 1) / 2
    for _ in range(layers - stages):
        cheapest = min(range(stages), key=lambda stage: (sizes[stage] + extra[stage], abs(stage - middle), stage))
        sizes[cheapest] += 1
    return sizes
