# SPDX-License-Identifier: Apache-2.0
"""The stream of samples as rows of equally many tokens.

The stream is cut into windows of neighboring samples. The samples of a window are packed into rows, the longest first,
each where it leaves the least room, and the rows follow one another in a random order. So a window depends on the seed
and its number alone: any process opens any window without those before it. A position in the stream of rows is the
number of samples before it, whole windows and whole rows: a checkpoint needs nothing else to go on exactly there.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from typing import NamedTuple

import numpy as np

from megatron_bert.data.hashing import derive_key
from megatron_bert.data.sampling import BlendedCorpus, permuted

WINDOW = 1024
"""Samples that are packed together. Of books in rows of 512 tokens, windows of 64, 256 and 1,024 fill 97.9, 99.0 and
99.5%."""
LEAST_SAMPLES = 4
"""Of a row's most, where the data decide."""
_LEAST_WINDOW = 64
"""Samples of a window where an epoch has fewer."""
_NEARLY_FULL = 1.002
_OPEN_WINDOWS = 256
_ORDER = 0x726F7773
"""What keys of the order of rows are derived with."""


def pack(lengths: np.ndarray, room: int, most: int | None = None) -> list[list[int]]:
    """Best fit, the longest first: the numbers of the samples of each row, the longest first.

    Args:
        lengths: int [n], of the samples, none above ``room``.
        room: tokens of a row.
        most: samples of a row; None sets no limit.
    """
    rows: list[list[int]] = []
    # Rows that have room left, by how much; the amounts that there are, in order.
    with_room: list[list[int]] = [[] for _ in range(room + 1)]
    rooms: list[int] = []
    order = np.argsort(-lengths, kind="stable")
    for sample, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, left = len(rows), room
            rows.append([])
        else:
            left = rooms[place]
            row = with_room[left].pop()
            if not with_room[left]:
                del rooms[place]
        rows[row].append(sample)
        left -= length
        if left and len(rows[row]) != most:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(row)
    return rows


class _Window(NamedTuple):
    """The rows of a window.

    Attributes:
        samples: int64 [n], numbers in the stream of its samples, row by row.
        ends: int64 [R], how many of them are in rows up to each.
    """

    samples: np.ndarray
    ends: np.ndarray


class RowStream:
    """A corpus as rows, from a position on.

    Args:
        length: tokens of a row, and of the longest sample.
        most: samples of a row at most; None finds it from the first window: the least of 4, 8, 16 and so on that fills
            rows as well as no limit would, but for 1 in 500.
        first_sample: samples of the stream before the first row. Where rows were others when it was noted, it may lie
            inside one: the next one is the first then.
    """

    def __init__(self, corpus: BlendedCorpus, *, length: int, most: int | None = None, first_sample: int = 0) -> None:
        self.corpus, self.length = corpus, length
        self.window_size = min(WINDOW, max(_LEAST_WINDOW, sum(len(dataset) for dataset in corpus.datasets)))
        self._windows: dict[int, _Window] = {}
        self.most = self._enough() if most is None else most
        self.first_window, inside = divmod(first_sample, self.window_size)
        #: Rows from the first on up to the end of each window from the first on.
        self._row_ends: list[int] = []
        #: Rows of the first window before the first row.
        self._before = 0
        if inside:
            self._before = int(np.searchsorted(self._window(self.first_window).ends, inside)) + 1

    def row(self, number: int) -> np.ndarray:
        """Numbers in the stream of the samples of a row, counted from the first: int64 [n], the longest first."""
        found, row = self._find(number)
        window = self._window(found)
        start = window.ends[row - 1] if row else 0
        return window.samples[start : window.ends[row]]

    def samples_before(self, number: int) -> int:
        """Samples of the stream before a row, counted from the first: the position to begin from to get it first."""
        window, row = self._find(number)
        return window * self.window_size + (int(self._window(window).ends[row - 1]) if row else 0)

    def fill(self) -> float:
        """Share of the tokens of the first window's rows that are those of samples."""
        return float(self._lengths(0).sum() / (len(self._window(0).ends) * self.length))

    def samples_per_row(self) -> float:
        """In the first window, on average."""
        return self.window_size / len(self._window(0).ends)

    def _enough(self) -> int:
        lengths, most = self._lengths(0), LEAST_SAMPLES
        unlimited = len(pack(lengths, self.length))
        while len(pack(lengths, self.length, most)) > unlimited * _NEARLY_FULL:
            most *= 2
        return most

    def _find(self, number: int) -> tuple[int, int]:
        """The window that a row is in, and its place there."""
        number += self._before
        while not self._row_ends or self._row_ends[-1] <= number:
            count = len(self._window(self.first_window + len(self._row_ends)).ends)
            self._row_ends.append(count + (self._row_ends[-1] if self._row_ends else 0))
        place = bisect_right(self._row_ends, number)
        return self.first_window + place, number - (self._row_ends[place - 1] if place else 0)

    def _window(self, number: int) -> _Window:
        """A window, packed; those used last are kept."""
        if number not in self._windows:
            rows = pack(self._lengths(number), self.length, self.most)
            order = permuted(np.arange(len(rows)), len(rows), derive_key(self.corpus.seed, _ORDER, number))
            samples = np.concatenate([rows[row] for row in order]) + number * self.window_size
            ends = np.cumsum([len(rows[row]) for row in order])
            while len(self._windows) >= _OPEN_WINDOWS:
                del self._windows[next(iter(self._windows))]
            self._windows[number] = _Window(samples, ends)
        return self._windows[number]

    def _lengths(self, window: int) -> np.ndarray:
        start = window * self.window_size
        return self.corpus.lengths(np.arange(start, start + self.window_size))
