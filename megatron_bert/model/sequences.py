"""How the flat token axis divides into sequences.

The encoder works on tokens ``[T, H]``; only attention needs to know which of them belong together. Two forms:

* a rectangle: B sequences of S tokens each, T = B * S, with an optional mask of real keys;
* packed: sequences of any lengths end to end, without padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """Sequences on a flat token axis.

    Attributes:
        batch: number of sequences B.
        length: S; for packed sequences the longest (an upper bound will do).
        key_mask: rectangle only: bool ``[B, S]``, true for tokens that may be attended to; None when all may.
        boundaries: packed only: int32 ``[B + 1]``, where each sequence starts and the last one ends (cu_seqlens).
        places: packed only: int64 ``[T]``, where each token stands in the rectangle ``B * S``; None where they fill it.
    """

    batch: int
    length: int
    key_mask: Tensor | None = None
    boundaries: Tensor | None = None
    places: Tensor | None = None

    @staticmethod
    def rectangle(batch: int, length: int, key_mask: Tensor | None = None) -> SequenceLayout:
        """B sequences of S tokens; ``key_mask`` bool ``[B, S]`` where some tokens are padding."""
        return SequenceLayout(batch=batch, length=length, key_mask=key_mask)

    @staticmethod
    def packed(lengths: Tensor, longest: int) -> SequenceLayout:
        """Sequences of ``lengths`` (int64 ``[B]``) end to end, none longer than ``longest``."""
        batch = lengths.shape[0]
        boundaries = torch.zeros(batch + 1, dtype=torch.int64, device=lengths.device)
        torch.cumsum(lengths, 0, out=boundaries[1:])
        total = int(boundaries[-1])
        if total == batch * longest:
            return SequenceLayout(batch=batch, length=longest, boundaries=boundaries.to(torch.int32))
        sequence = torch.repeat_interleave(torch.arange(batch, device=lengths.device), lengths, output_size=total)
        within = torch.arange(total, device=lengths.device) - boundaries[sequence]
        return SequenceLayout(
            batch=batch, length=longest, boundaries=boundaries.to(torch.int32), places=sequence * longest + within
        )

    @property
    def is_packed(self) -> bool:
        """Whether the sequences stand end to end without padding."""
        return self.boundaries is not None

    @cached_property
    def lengths(self) -> list[int]:
        """Packed only: tokens of each sequence, as numbers: on an accelerator, asking waits for it."""
        assert self.boundaries is not None, "a packed layout has boundaries"
        return self.boundaries.diff().tolist()

    @cached_property
    def empty_pairs(self) -> int:
        """Packed only: pairs of places in the rectangle that are not two tokens of one sequence."""
        return self.batch * self.length**2 - sum(length**2 for length in self.lengths)

    def to(self, device: torch.device) -> SequenceLayout:
        """The same layout with its tensors on ``device``."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> SequenceLayout:
        """The same layout in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> SequenceLayout:
        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return SequenceLayout(
            batch=self.batch,
            length=self.length,
            key_mask=changed(self.key_mask),
            boundaries=changed(self.boundaries),
            places=changed(self.places),
        )

    def to_rectangle(self, tokens: Tensor) -> Tensor:
        """Token rows ``[T, ..]`` as ``[B, S, ..]``, zero where there is no token."""
        if self.places is None:
            return tokens.unflatten(0, (self.batch, self.length))
        filled = tokens.new_zeros((self.batch * self.length, *tokens.shape[1:]))
        return filled.index_copy(0, self.places, tokens).unflatten(0, (self.batch, self.length))

    def from_rectangle(self, rectangle: Tensor) -> Tensor:
        """``[B, S, ..]`` back to token rows ``[T, ..]``."""
        flat = rectangle.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)

    def rectangle_mask(self) -> Tensor | None:
        """Bool ``[B, S]``, true for tokens that may be attended to; None when all may."""
        if self.boundaries is None or self.places is None:
            return self.key_mask
        lengths = self.boundaries.diff()
        return torch.arange(self.length, device=lengths.device) < lengths[:, None]
