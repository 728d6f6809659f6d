# SPDX-License-Identifier: Apache-2.0
"""A plan run by the C++ engine without torch, whose import takes longer and more memory than the whole model.

Shapes: B sequences, S tokens of each, T tokens end to end, H hidden size, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_bert.ibert.bounds import LOGIT_BITS, TANH_BITS
from megatron_bert.ibert.engine.arguments import check_lengths, check_threads
from megatron_bert.ibert.engine.native_engine import NativeEngine
from megatron_bert.ibert.engine.place import plan_path
from parallel.errors import UserError, brief

Floats = NDArray[np.float32]


class _Stream(NamedTuple):
    """The final stream ``[T, H]``, and where sequences begin ``[B + 1]``."""

    rows: NDArray[np.int16]
    starts: NDArray[np.int32]


class NativeModel:
    """A quantized model in integers, with numpy arrays for answers; the bits are those of every backend.

    Args:
        path: a plan's file, the directory of a quantized model, or the run that made it.
        threads: to use.

    Attributes:
        engine: the loaded plan.

    Raises:
        UserError: there is no plan, it is damaged, or nothing can run it here.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        check_threads(threads)
        self.engine = NativeEngine(plan_path(Path(path)), threads)

    def hidden_states(
        self, sequences: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None
    ) -> list[Floats]:
        """The encoder's results.

        Args:
            sequences: token ids of each; none is padding.
            types: token types of the same lengths; 0 by default.

        Returns:
            For every sequence ``[S, H]``.

        Raises:
            UserError: ids out of range, or sequences that are empty or too long.
        """
        stream = self._encode(sequences, types)
        values = stream.rows.astype(np.float32) * np.float32(2.0**-self.engine.hidden_exponent)
        return np.split(values, stream.starts[1:-1])

    def logits(
        self,
        sequences: Sequence[Sequence[int]],
        types: Sequence[Sequence[int]] | None = None,
        head: str = "classifier",
    ) -> Floats | list[Floats]:
        """What a head makes of sequences.

        Args:
            sequences, types: see :meth:`hidden_states`.
            head: ``classifier``, ``pair``, ``masked`` or ``pooler``.

        Returns:
            Of a head that reads the pooler, and of the pooler, ``[B, C]``; of others ``[S, C]`` for every sequence.

        Raises:
            UserError: the plan has no such head; and see :meth:`hidden_states`.
        """
        if not isinstance(head, str) or not self.engine.outputs(head):
            raise UserError(f"the plan has no head {head!r}")
        stream = self._encode(sequences, types)
        pooled = head == "pooler" or (head != "masked" and self.engine.outputs("pooler") > 0)
        if not pooled:
            return np.split(self._head(head, stream.rows), stream.starts[1:-1])
        first = stream.rows[stream.starts[:-1]]
        if head == "pooler":
            return self._head(head, first, TANH_BITS)
        return self._head(head, self.engine.head("pooler", first).astype(np.int16))

    def _encode(self, sequences: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None) -> _Stream:
        tokens = _integers(sequences, "token ids")
        lengths = [len(each) for each in tokens]
        check_lengths(lengths)
        kinds = None if types is None else _integers(types, "types")
        if kinds is not None and [len(each) for each in kinds] != lengths:
            raise UserError("types have other lengths than sequences: give a type for every token")
        starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        flat = None if kinds is None else np.concatenate(kinds)
        return _Stream(self.engine.encode(np.concatenate(tokens), None, flat, starts), starts)

    def _head(self, head: str, rows: NDArray[np.int16], bits: int = LOGIT_BITS) -> Floats:
        return self.engine.head(head, rows).astype(np.float32) * np.float32(2.0**-bits)


def _integers(sequences: Sequence[Sequence[int]], what: str) -> list[NDArray[np.int32]]:
    """Each sequence as an array ``[S]``; the largest of its kind stands for integers beyond, which are no ids either.

    Raises:
        UserError: they are no sequences of integers.
    """
    try:
        arrays = [np.asarray(sequence) for sequence in sequences]
    except (TypeError, ValueError):  # not a sequence, or one of sequences of different lengths
        arrays = [np.empty(())]
    if any(array.ndim != 1 for array in arrays):
        raise UserError(f"{what} are {brief(sequences)}: give a list of integers for each sequence")
    for array in arrays:
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise UserError(f"{what} are {array.dtype}: give integers")
    limits = np.iinfo(np.int32)
    return [array.astype(np.int64).clip(limits.min, limits.max).astype(np.int32) for array in arrays]
