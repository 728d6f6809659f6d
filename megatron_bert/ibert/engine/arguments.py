# SPDX-License-Identifier: Apache-2.0
"""Checks of what engines are given, of torch and of numpy alike. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from parallel.errors import UserError, brief

#: Threads that an engine takes at most.
MOST_THREADS = 1024


def check_threads(threads: object) -> None:
    """A number of threads.

    Raises:
        UserError: it is none.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise UserError(f"threads is {brief(threads)}: give a number of 1 or more")
    if threads > MOST_THREADS:
        raise UserError(f"threads is {threads}, not 1 to {MOST_THREADS}")


def check_lengths(lengths: Sequence[int]) -> None:
    """Lengths of the sequences of a batch.

    Raises:
        UserError: there is none, or one is 0.
    """
    if not lengths or min(lengths) < 1:
        raise UserError("a batch has no sequence, or one without tokens: give at least one token of each")


def check_end(end: int, tokens: Any, *others: Any) -> None:
    """Where the last sequence ends, and what is given of every token: arrays or tensors ``[T]``, or None.

    Raises:
        UserError: that is of another number of tokens.
    """
    if any(tuple(each.shape) != (end,) for each in (tokens, *others) if each is not None):
        raise UserError(f"sequences end at token {end}, but {len(tokens)} tokens are given")


def check_rows(shape: Sequence[int], columns: int) -> None:
    """The shape of rows that a head reads.

    Raises:
        UserError: they are none, or have another number of columns.
    """
    if len(shape) != 2 or shape[1] != columns:
        raise UserError(f"rows have the shape {[*shape]}, but the plan's have {columns} columns")
