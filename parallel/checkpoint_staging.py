# SPDX-License-Identifier: Apache-2.0
"""Memory for a copy of what a rank writes to a checkpoint, which another process can read."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from parallel.checkpoint_plan import WritePlan
from parallel.parts import Part


class Staging:
    """A copy of a rank's part of the state, in memory that is taken once and used for every save.

    It has no name in the file system: when the processes that hold it are gone, however they ended, it is too, and the
    size of ``/dev/shm`` does not limit it. What other ranks write is not copied.

    Args:
        plan: what is copied.
        device: whose memory it is copied from; for a GPU the memory is pinned.

    Attributes:
        descriptor: of the memory, for the other process.
    """

    def __init__(self, plan: WritePlan, device: torch.device) -> None:
        self.plan = plan
        size = max(1, plan.staged_bytes)
        self.descriptor = os.memfd_create("checkpoint")
        os.ftruncate(self.descriptor, size)
        # Pages come with the first copy, which holds up nobody; all at once, they would hold up the interpreter.
        self._memory = torch.frombuffer(mmap.mmap(self.descriptor, size), dtype=torch.uint8)
        # Without pinning, which a limit on locked memory may refuse, copies are slower and otherwise the same.
        self._pinned = device.type == "cuda" and not int(
            torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0)
        )

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor | Part]) -> None:
        """Copy the values; on a GPU, queue their copies in the current stream."""
        for (name, offsets), piece in zip(self.plan.blocks, self.plan.pieces, strict=True):
            if piece.nbytes:
                source = Part.of(tensors[name]).block(offsets)
                if self._pinned:
                    source.record_stream(torch.cuda.current_stream(source.device))
                place = self._memory[piece.start : piece.start + piece.nbytes].view(source.dtype)
                place.view(source.shape).copy_(source, non_blocking=self._pinned)

    def close(self) -> None:
        """Give the memory back; not while another process is to read it."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        del self._memory
        os.close(self.descriptor)
