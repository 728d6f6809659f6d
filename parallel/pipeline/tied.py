# SPDX-License-Identifier: Apache-2.0
"""One parameter held by two stages: word embeddings of the first and the last."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.gradients import own_gradient
from parallel.mesh import ParallelMesh
from parallel.process_group import own_group


class TiedParameter:
    """Keeps the copies of a parameter on the first and the last stage equal.

    Both start from the same initial values or checkpoint, get the same gradient (the sum of both stages' shares,
    once per step) and so the same update: they stay equal bit for bit. The first stage's copy stands for both in the
    gradient norm and in checkpoints.

    Every rank of the run must construct it at the same point.

    Args:
        first_rank: pipeline rank of the first stage.
        last_rank: pipeline rank of the last stage.
        first: the first stage's parameter, on its rank.
        last: the last stage's parameter, on its rank.
    """

    def __init__(
        self,
        mesh: ParallelMesh,
        *,
        first_rank: int,
        last_rank: int,
        first: nn.Parameter | None,
        last: nn.Parameter | None,
    ) -> None:
        self.first, self.last = first, last
        self.group: dist.ProcessGroup | None = None
        if first_rank != last_rank:
            self.group = own_group([line[first_rank], line[last_rank]] for line in mesh.pipelines)

    def copies(self) -> list[nn.Parameter]:
        """Those of this rank; none where the model has a single one."""
        mine = [parameter for parameter in (self.first, self.last) if parameter is not None]
        return mine if self.group is not None or (len(mine) == 2 and mine[0] is not mine[1]) else []

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Give both copies the sum of their gradients."""
        if self.first is not None and self.last is not None:
            if self.first is not self.last:
                one, other = _gradient(self.first), _gradient(self.last)
                other.copy_(one.add_(other))
        elif self.group is not None:
            mine = self.first if self.first is not None else self.last
            assert mine is not None, "a rank of the pair holds one of the copies"
            dist.all_reduce(_gradient(mine), group=self.group)


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = own_gradient(parameter)
    assert gradient is not None, "the stage has run its backward pass"
    return gradient
