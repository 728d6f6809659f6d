# SPDX-License-Identifier: Apache-2.0
"""Point-to-point transport between the stages of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from parallel.mesh import ParallelMesh
from parallel.pipeline.communication import Channel
from parallel.process_group import own_group


@dataclass(frozen=True)
class PipelineTransport:
    """Asynchronous sends and receives along one line of pipeline ranks.

    Messages to higher and to lower pipeline ranks travel in groups of their own: on NCCL the operations of a group
    between two ranks share a stream, and one that waits would hold up those of the other direction.

    Attributes:
        ranks: global rank of each pipeline rank of the line.
        up: group for messages to higher pipeline ranks.
        down: group for messages to lower ones.
    """

    ranks: tuple[int, ...]
    up: dist.ProcessGroup
    down: dist.ProcessGroup

    @staticmethod
    def create(mesh: ParallelMesh) -> PipelineTransport | None:
        """The transport of this rank's line; None for a pipeline of one. Every rank of the run must call."""
        if mesh.layout.pipeline == 1:
            return None
        up, down = own_group(mesh.pipelines), own_group(mesh.pipelines)
        assert up is not None, "every rank is in a pipeline"
        assert down is not None
        return PipelineTransport(tuple(dist.get_process_group_ranks(up)), up, down)

    def close(self) -> None:
        """Destroy the process groups; every rank calls."""
        for group in (self.up, self.down):
            dist.destroy_process_group(group)

    def _group(self, channel: Channel) -> dist.ProcessGroup:
        return self.up if channel.destination > channel.source else self.down

    def send(self, tensor: Tensor, channel: Channel) -> dist.Work:
        """Start sending; the tensor must stay as it is until the work is done."""
        work = dist.isend(tensor, self.ranks[channel.destination], group=self._group(channel))
        assert work is not None
        return work

    def receive(self, buffer: Tensor, channel: Channel) -> dist.Work:
        """Start receiving; the buffer holds the message when the work is done."""
        work = dist.irecv(buffer, self.ranks[channel.source], group=self._group(channel))
        assert work is not None
        return work
