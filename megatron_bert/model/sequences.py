# SPDX-License-Identifier: Apache-2.0
"""How the flat token axis divides into sequences.

The encoder works on tokens ``[T, H]``; only attention needs to know which of them belong together. Three forms:

* a rectangle: B sequences of S tokens each, T = B * S, with an optional mask of real keys;
* packed: sequences of any lengths end to end, without padding;
* packed into rows: the same, in shapes that do not depend on the lengths. Where attention needs a rectangle, it is
  one of rows that hold several sequences each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_bert.model.movable import Movable

#: Most tokens that packed sequences are filled up to a multiple of.
_ROUND = 64


def filling(tokens: int, multiple: int = 1, *, few: bool = False) -> int:
    """How many tokens to add to packed sequences, so that batches have few different sizes.

    Matrix products of sizes that were not seen before cost up to twice the time: oneDNN compiles code for each, and
    keeps it. Batches are filled up to a multiple of 64 tokens, small ones by a sixteenth at most.

    Args:
        tokens: of the sequences.
        multiple: what their number has to be a multiple of in any case, for tensor ranks that divide them.
        few: at most eight sizes from each power of two to the next, by an eighth more tokens at most, for compiled
            code.
    """
    if few:
        return -tokens % math.lcm(multiple, 2 ** max(0, tokens.bit_length() - 4))
    power = max(0, (tokens // 16).bit_length() - 1)
    return -tokens % math.lcm(multiple, min(_ROUND, 2**power))


class Bounds(NamedTuple):
    """What the micro batches of a run have at most, so that shapes depend on few numbers.

    Attributes:
        sequences: of a micro batch.
        longest: tokens of a sequence.
        multiple: of which their number of tokens is, with filling.
    """

    sequences: int
    longest: int
    multiple: int = 1

    @property
    def places(self) -> int:
        """Sequences that every micro batch is laid out for, those of filling included, and of no tokens."""
        # Filling is less than an eighth of the tokens, times the multiple: so many sequences take it.
        return self.sequences + self.multiple * (self.sequences // 8 + 1) + 1


def longest_first(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How sequences stand end to end when the longest comes first, so that similar ones are neighbors.

    Args:
        lengths: int64 ``[B]``.

    Returns:
        int64 ``[B]`` each: the numbers of the sequences in that order, and where each sequence starts.
    """
    order = np.argsort(-lengths, kind="stable")
    starts = np.empty_like(lengths)
    starts[order] = np.cumsum(lengths[order]) - lengths[order]
    return order, starts


@dataclass(frozen=True, kw_only=True)
class SequenceLayout(Movable):
    """Sequences on a flat token axis.

    Attributes:
        batch: number of sequences B; of rows where there are any.
        length: S; for packed sequences the longest (an upper bound will do).
        key_mask: rectangle only: bool ``[B, S]``, true for tokens that may be attended to; None when all may.
        boundaries: packed only: int32, where each sequence starts and the last one ends (cu_seqlens): ``[B + 1]``, or
            a fixed number for rows, with sequences of no tokens at the end.
        places: packed only: int64 ``[T]``, where each token stands in the rectangle ``B * S``; None where they fill it.
        fill: packed only: how many tokens at the end are filling, sequences of their own that nothing is made of.
        owners: rows only: int64 ``[B, S]``, which sequence of the row each place belongs to.
        row_positions: rows only: int32 ``[B, S]``, which place of its sequence that is.
    """

    batch: int
    length: int
    key_mask: Tensor | None = None
    boundaries: Tensor | None = None
    places: Tensor | None = None
    fill: int = 0
    owners: Tensor | None = None
    row_positions: Tensor | None = None

    @staticmethod
    def rectangle(batch: int, length: int, key_mask: Tensor | None = None) -> SequenceLayout:
        """B sequences of S tokens; ``key_mask`` bool ``[B, S]`` where some tokens are padding."""
        return SequenceLayout(batch=batch, length=length, key_mask=key_mask)

    @staticmethod
    def packed(lengths: Tensor, longest: int, fill: int = 0, bounds: Bounds | None = None) -> SequenceLayout:
        """Sequences of ``lengths`` (int64) end to end, of at most ``longest`` each, then ``fill`` tokens of filling.

        The filling is sequences of their own, like the last one in length. With ``bounds`` shapes depend on the number
        of tokens and the bounds alone: there are sequences of no tokens at the end.
        """
        if bounds is not None:
            lengths, longest = _within_bounds(lengths, fill, bounds), bounds.longest
        elif fill:
            last = int(lengths[-1])
            lengths = torch.cat(
                (lengths, lengths.new_tensor([last] * (fill // last) + [fill % last] * (fill % last > 0)))
            )
        batch = lengths.shape[0]
        boundaries = torch.zeros(batch + 1, dtype=torch.int64, device=lengths.device)
        torch.cumsum(lengths, 0, out=boundaries[1:])
        total = int(boundaries[-1])
        if bounds is None and total == batch * longest:
            return SequenceLayout(batch=batch, length=longest, boundaries=boundaries.to(torch.int32), fill=fill)
        sequence = torch.repeat_interleave(torch.arange(batch, device=lengths.device), lengths, output_size=total)
        within = torch.arange(total, device=lengths.device) - boundaries[sequence]
        return SequenceLayout(
            batch=batch,
            length=longest,
            boundaries=boundaries.to(torch.int32),
            places=sequence * longest + within,
            fill=fill,
        )

    @staticmethod
    def rows(lengths: Sequence[Sequence[int]], length: int, most: int) -> SequenceLayout:
        """Rows of ``length`` tokens each, filled up; the sequences of all rows stand longest first, filling at last.

        Args:
            lengths: of the sequences of each row.
            length: tokens of a row.
            most: sequences of a row at most; the filling is one more.
        """
        sizes = np.zeros((len(lengths), most + 1), dtype=np.int64)
        for row, given in enumerate(lengths):
            sizes[row, : len(given)] = given
            sizes[row, most] = length - sum(given)
        order, _ = longest_first(sizes[:, :most].flatten())
        filling = np.arange(len(lengths)) * (most + 1) + most
        numbers = np.concatenate([order // most * (most + 1) + order % most, filling])
        starts = np.cumsum(sizes, axis=1) - sizes + np.arange(len(lengths))[:, None] * length
        flat, flat_starts = sizes.flatten()[numbers], starts.flatten()[numbers]
        ends = np.cumsum(flat)
        owners = np.repeat(np.tile(np.arange(most + 1), len(lengths)), sizes.flatten())
        positions = np.arange(len(lengths) * length) - np.repeat(starts.flatten(), sizes.flatten())
        return SequenceLayout(
            batch=len(lengths),
            length=length,
            boundaries=torch.from_numpy(np.concatenate([[0], ends])).to(torch.int32),
            places=torch.from_numpy(np.repeat(flat_starts - (ends - flat), flat) + np.arange(len(lengths) * length)),
            fill=int(sizes[:, most].sum()),
            owners=torch.from_numpy(owners).view(len(lengths), length),
            row_positions=torch.from_numpy(positions).to(torch.int32).view(len(lengths), length),
        )

    @property
    def is_packed(self) -> bool:
        """Whether the sequences stand end to end without padding."""
        return self.boundaries is not None

    @cached_property
    def lengths(self) -> list[int]:
        """Packed only: tokens of each sequence that has any: on an accelerator, asking waits for it."""
        assert self.boundaries is not None, "a packed layout has boundaries"
        return [length for length in self.boundaries.diff().tolist() if length]

    def parts(self, pairs: int) -> list[SequenceLayout]:
        """Packed only: runs of neighboring sequences that are similar enough to fill a rectangle of their own.

        Args:
            pairs: how many pairs of places of a sequence may be padding, beside its longest neighbor.
        """
        if pairs not in self._parts:
            runs = _runs(self.lengths, pairs)
            self._parts[pairs] = [SequenceLayout.packed(torch.tensor(run), max(run)) for run in runs]
        return self._parts[pairs]

    @cached_property
    def _parts(self) -> dict[int, list[SequenceLayout]]:
        return {}

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

    def real_tokens(self) -> Tensor | None:
        """Bool ``[T]``, true for tokens that are neither padding nor filling; None when all are."""
        if self.key_mask is not None:
            return self.key_mask.flatten()
        if not self.fill:
            return None
        assert self.boundaries is not None, "only packed sequences are filled up"
        tokens = self.batch * self.length if self.places is None else self.places.shape[0]
        real = self.boundaries.new_ones(tokens, dtype=torch.bool)
        real[-self.fill :] = False
        return real

    def real_places(self) -> Tensor | None:
        """Bool ``[B, S]``, the same in the rectangle; None when all are."""
        real = self.real_tokens()
        if real is None:
            return None if self.owners is not None else self.rectangle_mask()
        return self.to_rectangle(real)

    def rectangle_mask(self) -> Tensor | None:
        """Bool ``[B, S]``, true for tokens that may be attended to; None when all may.

        Of rows ``[B, 1, S, S]``, true where query and key are of one sequence.
        """
        if self.owners is not None:
            return (self.owners[:, :, None] == self.owners[:, None, :])[:, None]
        if self.boundaries is None or self.places is None:
            return self.key_mask
        lengths = self.boundaries.diff()
        return torch.arange(self.length, device=lengths.device) < lengths[:, None]


def _runs(lengths: list[int], pairs: int) -> list[list[int]]:
    runs: list[list[int]] = []
    shortest = longest = 0
    for length in lengths:
        shortest, longest = min(shortest, length), max(longest, length)
        if runs and longest**2 - shortest**2 <= pairs:
            runs[-1].append(length)
        else:
            runs.append([length])
            shortest = longest = length
    return runs


def _within_bounds(lengths: Tensor, fill: int, bounds: Bounds) -> Tensor:
    """Lengths of sequences and then of filling, in a number that depends on the bounds alone: the last are 0."""
    filled = [bounds.longest] * (fill // bounds.longest) + [fill % bounds.longest]
    assert len(lengths) + len(filled) <= bounds.places, "micro batches are within their bounds"
    sizes = lengths.new_zeros(bounds.places)
    sizes[: len(lengths)] = lengths
    sizes[len(lengths) : len(lengths) + len(filled)] = lengths.new_tensor(filled)
    return sizes
