"""Micro batches: what one forward pass takes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_bert.model.sequences import SequenceLayout
from parallel.cross_entropy import IGNORED
from parallel.dropout import fold_in


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sequences on a flat token axis, with what is to be predicted from them.

    Attributes:
        tokens, positions, types: int64 ``[T]``.
        samples: int64 ``[T]``, number in the training stream of the sample each token belongs to.
        layout: which tokens belong together.
        slots: int64 ``[K]``, indices on the token axis of the masked tokens; unused slots point at token 0.
        slot_labels: int64 ``[K]``, their true ids; -100 for unused slots.
        first_tokens: int64 ``[B]``, where each sample starts.
        pair_labels: int64 ``[B]``, 0 in order / next, 1 swapped / random; -100 without a pair objective.
        lengths: number of tokens of each sample, without padding.
    """

    tokens: Tensor
    positions: Tensor
    types: Tensor
    samples: Tensor
    layout: SequenceLayout
    slots: Tensor
    slot_labels: Tensor
    first_tokens: Tensor
    pair_labels: Tensor
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on ``device``."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return replace(self, layout=self.layout.to(device), **moved)

    def pin_memory(self) -> MicroBatch:
        """The same batch in page-locked memory, so that copies to the device overlap computation."""
        pinned = {
            field.name: getattr(self, field.name).pin_memory()
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return replace(self, **pinned)

    def masked_count(self) -> int:
        """Number of slots in use."""
        return int((self.slot_labels != IGNORED).sum())

    def dropout_keys(self, seed: int) -> Tensor:
        """int64 ``[T]``: a key for each token that depends on (seed, sample, position) alone."""
        return fold_in(fold_in(self.samples, seed), self.positions)
