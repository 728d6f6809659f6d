# SPDX-License-Identifier: Apache-2.0
"""Quantizers: the range of one place of a model, the scale that follows from it, and what was seen there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import floor, log2
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_bert.ibert.epilogues import Target, Watch
from megatron_bert.ibert.fixed_point import largest
from megatron_bert.ibert.observers import histogram, least_error_range, percentile_range
from megatron_bert.ibert.settings import QuantizationConfig
from megatron_bert.model.activations import LEAST_GELU
from parallel.errors import UserError

#: ``signed``: symmetric, for inputs of matrix products; ``attention``: the same, for queries, keys and values.
#: ``gelu``: asymmetric, from the least value of an activation (mostly GELU) up. ``stream``: symmetric, with a power of
#: two as scale.
Kind = Literal["signed", "attention", "gelu", "stream"]
#: Given a quantizer and its tensor: real values of the float model, or the integers as they are carried.
Tap = Callable[["Quantizer", Tensor], None]


#: No scale is finer than 2^-20.
_FINEST = 20
#: A range of the stream is at most this many steps: a requantized term of a sum saturates from 2^14 steps on.
_LARGEST_TERM = 2**14 - 1
#: The range of what was never seen. A tensor of zeros has the range 0.
UNKNOWN = -1.0
#: Of the names of quantizers as modules.
MODULE_ENDING = "_range"


class Quantizer(nn.Module):
    """The range of one tensor.

    Attributes:
        range: float32 scalar buffer, the largest magnitude (``gelu``: value) that is represented; -1 until calibrated.
        least: of ``gelu``, the least real value.
        frozen: whether observations leave the range as it is.
        unused: whether the pass that was to find the range did not run this part of the model.
        tap: called with the tensor at each use, integers as they are carried; None mostly.
    """

    range: Tensor

    def __init__(self, kind: Kind, settings: QuantizationConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.kind, self.settings = kind, settings
        of_kind = {"stream": settings.residual_bits, "attention": settings.attention_bits}
        self.bits = of_kind.get(kind, settings.activation_bits)
        self.observer = "min_max" if kind == "stream" else settings.observer
        self.register_buffer("range", torch.full((), UNKNOWN, dtype=torch.float32, device=device))
        self.least, self.frozen, self.unused = LEAST_GELU, False, False
        self.tap: Tap | None = None
        #: Of the step in progress: the largest magnitude, or a histogram; None when nothing was seen.
        self.pending: Tensor | None = None
        #: Of all batches of a calibration.
        self.counts: Tensor | None = None
        #: The range as a number, for the tensor and its version: reading it waits for an accelerator.
        self._known: tuple[Tensor, int, float] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}  # versions of a copied tensor start over

    # ---------------------------------------------------------------- scale

    def limit(self) -> float:
        """The range as a number."""
        held, version = self.range, self.range._version
        if self._known is None or self._known[0] is not held or self._known[1] != version:
            self._known = (held, version, float(held))
        return self._known[2]

    @property
    def known(self) -> bool:
        """Whether there is a range."""
        return self.limit() >= 0.0

    def scale(self) -> float:
        """The real value of one step.

        Raises:
            UserError: the range was never calibrated.
        """
        limit = self.limit()
        if not limit >= 0.0:
            raise UserError(
                "a quantized model was run before its ranges were calibrated: run calibrate(), or load a checkpoint "
                "that holds ranges"
            )
        if self.kind == "stream":
            # The finest scale serves all ranges that ask for less.
            most = min(largest(self.bits), _LARGEST_TERM)
            return 2.0 ** -min(_FINEST, floor(log2(most / max(limit, 2.0**-_FINEST))))
        if self.kind == "gelu":
            return (limit - self.least) / (2**self.bits - 1)
        return max(2.0**-_FINEST, limit / largest(self.bits))

    def target(self, real: Tensor | None = None) -> Target:
        """What a layer needs to make integers of this quantizer; ``real`` as for :meth:`watch`."""
        scale = self.scale()
        if self.kind == "gelu":
            zero_point = floor(-self.least / scale + 0.5)
            return Target(-zero_point, 2**self.bits - 1 - zero_point, scale, watch=self.watch(real))
        limit = largest(self.bits)
        return Target(-limit, limit, scale, self.kind == "stream", self.watch(real))

    def largest_integer(self) -> int:
        """Largest magnitude of the integers."""
        target = self.target()
        return max(-target.low, target.high)

    # ---------------------------------------------------------------- observation

    def observe(self, x: Tensor, real: Tensor | None = None) -> None:
        """Take note of real values, where the float model runs (calibration, or a float pass for comparison).

        Args:
            x: ``[T, ..]``.
            real: bool ``[T]``, tokens that are not padding, whose values count; None when all are.
        """
        if self.tap is not None:
            self.tap(self, x.detach())
        self.see(x, real)

    def see(self, x: Tensor, real: Tensor | None = None) -> None:
        """Let real values count for the range that are not those the quantizer stands for, but have its scale."""
        if self.frozen:
            return
        x = x if real is None else x[real]
        if x.numel() == 0:
            return
        magnitudes = x.detach().clamp(min=0.0) if self.kind == "gelu" else x.detach().abs()
        if self.observer == "min_max":
            self._note(magnitudes.max().float())
        else:
            counts = histogram(magnitudes)
            self.pending = counts if self.pending is None else self.pending + counts

    def _note(self, peak: Tensor) -> None:
        self.pending = peak if self.pending is None else torch.maximum(self.pending, peak)

    def used(self, q: Tensor) -> None:
        """Show a tap the integers (or multiples of the unit) of integer arithmetic."""
        if self.tap is not None:
            self.tap(self, q.detach())

    def watch(self, real: Tensor | None = None) -> Watch | None:
        """What notes the magnitude of integers before they are clamped; None while the range is fixed.

        Args:
            real: bool, of the first dimensions of the tensor: where tokens are neither padding nor filling, whose
                values count; None where all do. How many there are of the others depends on how a batch is divided.
        """
        if self.frozen or self.observer != "min_max" or not self.training:
            return None
        scale = self.scale()

        def note(rounded: Tensor, rows: slice) -> None:
            if real is not None:
                others = ~real[rows]
                rounded = rounded.masked_fill(others.reshape(*others.shape, *(1,) * (rounded.dim() - others.dim())), 0)
            low, high = torch.aminmax(rounded)
            peak = high if self.kind == "gelu" else torch.maximum(-low, high)
            self._note((peak.double().clamp_(min=0.0) * scale).float())

        return note

    def restart(self) -> None:
        """Forget the range and what it came from, for a calibration."""
        self.range.fill_(UNKNOWN)
        self.pending = self.counts = None
        self.frozen = self.unused = False

    def note(self, x: Tensor, real: Tensor | None = None) -> None:
        """Take note of real values of the stream where integer arithmetic reads them; nothing while it is fixed.

        Args:
            x: ``[T, ..]``.
            real: as for :meth:`watch`.
        """
        if (watch := self.watch(real)) is not None:
            watch(x.detach() / self.scale(), slice(None))

    def follow(self) -> None:
        """Move the range to what was observed since the last call; ranks must have agreed on it before."""
        if self.pending is None or self.frozen:
            self.pending = None
            return
        if self.observer == "min_max":
            peak = self.pending
            momentum = self.settings.momentum if self.known else 0.0
            self.range.copy_(self.range.float() * momentum + peak * (1.0 - momentum))
        else:
            self.counts = self.pending if self.counts is None else self.counts + self.pending
            counts = self.counts.cpu()
            if self.observer == "percentile":
                self.range.fill_(percentile_range(counts, self.settings.percentile))
            else:
                self.range.fill_(
                    least_error_range(counts, 2**self.bits - 1 if self.kind == "gelu" else largest(self.bits))
                )
        self.pending = None

    def extra_repr(self) -> str:
        """Kind and range."""
        return f"{self.kind}, bits={self.bits}, range={self.limit():.4g}"


class Ranges(nn.Module):
    """The quantizers of a module by name.

    Tools such as PEFT pick layers by the ends of their names, for example ``query``. So the module of the quantizer
    ``query`` is called ``query_range``; in a state dict its range is still ``query.range``.
    """

    def __init__(self, quantizers: Mapping[str, Quantizer]) -> None:
        super().__init__()
        self._names = tuple(quantizers)
        for name, quantizer in quantizers.items():
            self.add_module(f"{name}{MODULE_ENDING}", quantizer)

    def __getitem__(self, name: str) -> Quantizer:
        return self._modules[f"{name}{MODULE_ENDING}"]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def _keys(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Names in a state dict, and as PyTorch finds them."""
        return ((f"{prefix}{name}.range", f"{prefix}{name}{MODULE_ENDING}.range") for name in self._names)

    def state_dict(self, *args: Any, prefix: str = "", **others: Any) -> Any:
        """As of modules, under the names of quantizers."""
        state = super().state_dict(*args, prefix=prefix, **others)
        for ours, found in self._keys(prefix):
            state[ours] = state.pop(found)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for ours, found in self._keys(prefix):
            if ours in state_dict:
                state_dict[found] = state_dict.pop(ours)
        super()._load_from_state_dict(state_dict, prefix, *rest)
