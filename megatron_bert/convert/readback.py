# SPDX-License-Identifier: Apache-2.0
"""What was written, read again as a user would and compared with what should have been written."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_bert.convert.opening import open_checkpoint
from megatron_bert.convert.state import CanonicalState, StateTensor, bytes_of, not_finite
from megatron_bert.model.activations import GELU_APPROXIMATIONS
from megatron_bert.model.configuration import MegatronBertConfig
from parallel.errors import UserError

#: Fields of the configuration that every format stores.
_STORED = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings"),
    *("type_vocab_size", "vocab_size", "layer_norm_eps"),
)


class Written:
    """A state that remembers what its tensors were when they were read, to be written.

    Args:
        label: of the destination, for messages.
        advance: is told the bytes of each tensor that was dealt with.

    Attributes:
        state: the same; reading a tensor adds a warning where it holds values that are not numbers.
    """

    def __init__(self, state: CanonicalState, label: str, advance: Callable[[int], object]) -> None:
        self._label, self._advance = label, advance
        self._sums: dict[str, int] = {}
        self._warnings = state.warnings
        self.state = replace(
            state,
            tensors={name: self._watched(name, tensor) for name, tensor in state.items()},
            optimizer={name: self._watched(name, tensor) for name, tensor in state.optimizer.items()},
        )

    def _watched(self, name: str, tensor: StateTensor) -> StateTensor:
        def watch(values: Tensor) -> Tensor:
            if name not in self._sums:
                self._sums[name] = zlib.crc32(bytes_of(values))
                if count := not_finite(values):
                    self._warnings.append(f"{name} ({tensor.origin}) holds {count} infinite or undefined values")
                self._advance(tensor.nbytes)
            return values

        return tensor.mapped(watch)

    def check(self, place: Path, to: str, *, values: bool = False) -> None:
        """Open what was written, and compare it.

        Args:
            values: read and compare every value, not only names, shapes and the configuration.

        Raises:
            UserError: what is read is something else.
        """
        with open_checkpoint(place) as found:
            problem = self._difference(found, to)
            if problem is None and values:
                problem = self._other_values(found)
        if problem is not None:
            raise UserError(
                f"what was written for {self._label} is not what should be there, {problem}: the disk may be failing, "
                "or another process writes there; nothing was replaced"
            )

    def _difference(self, found: CanonicalState, to: str) -> str | None:
        if found.facts.format != to:
            return f"it is read as {found.facts.format} instead of {to}"
        for name, ours in _plain(self.state.config).items():
            if (theirs := _plain(found.config)[name]) != ours:
                return f"its {name} is read as {theirs} instead of {ours}"
        if found.head != self.state.head:
            return f"its head is read as one for {found.head} instead of {self.state.head}"
        if to in ("native", "huggingface"):
            if self.state.head is not None and found.config.id2label != self.state.config.id2label:
                return "the names of its classes are read as others"
            if found.ranges != self.state.ranges:
                return "its ranges are read as others"
        pairs: list[tuple[Mapping[str, StateTensor], Mapping[str, StateTensor]]] = [(self.state, found)]
        if to == "native":
            pairs.append((self.state.optimizer, found.optimizer))
        for expected, read in pairs:
            if read.keys() != expected.keys():
                return f"{min(read.keys() ^ expected.keys())} is read in only one of source and result"
            for name, tensor in expected.items():
                if (read[name].shape, read[name].dtype) != (tensor.shape, tensor.dtype):
                    return f"{name} is read with another shape or number format"
        return None

    def _other_values(self, found: CanonicalState) -> str | None:
        for name, tensor in (*found.items(), *found.optimizer.items()):
            values = tensor.load()
            if name not in self._sums:
                (self.state if name in self.state else self.state.optimizer)[name].load()
            if zlib.crc32(bytes_of(values)) != self._sums[name]:
                return f"{name} is read with other values"
            self._advance(tensor.nbytes)
        return None


def _plain(config: MegatronBertConfig) -> dict[str, object]:
    """The fields that every format stores; names of one activation count as the same."""
    act = config.hidden_act
    return {name: getattr(config, name) for name in _STORED} | {"hidden_act": GELU_APPROXIMATIONS.get(act, act)}
