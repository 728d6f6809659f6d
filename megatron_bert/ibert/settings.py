# SPDX-License-Identifier: Apache-2.0
"""How a model is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from parallel.errors import UserError

#: What can be computed in floating point from dequantized values, and the kinds it stands for.
FORCE_DEQUANT: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "gelu": frozenset({"gelu"}),
    "softmax": frozenset({"softmax"}),
    "layernorm": frozenset({"layernorm"}),
    "nonlinear": frozenset({"gelu", "softmax", "layernorm"}),
}
OBSERVERS = ("min_max", "percentile", "mse")
EQUALIZATIONS = ("auto", "none", "gamma", "smooth")
#: Widths of the residual stream, which is held in 16 bits.
_RESIDUAL_BITS = range(10, 17)


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """Bit widths, range observers and exceptions of a quantized model.

    Attributes:
        weight_bits: 8, or 7, with which sums of two products stay exact in the 16-bit accumulation of CPUs without
            dot-product instructions.
        activation_bits: of the inputs of matrix products with weights: 8 or 7.
        attention_bits: of queries, keys and values: 8, or 7, with which the same holds for the products of attention.
        residual_bits: of the residual stream and of every tensor between modules: 10 to 16.
        observer: what makes a range of the inputs of matrix products from what calibration sees: ``min_max`` (the
            largest magnitude, averaged over batches), ``percentile`` or ``mse`` (the range of least squared error, both
            of a histogram of all batches). The residual stream always uses its largest magnitude.
        momentum: of the average over batches of ``min_max``.
        percentile: per cent of elements inside the range, for ``percentile``.
        force_dequant: what is computed in floating point from dequantized values, to find out what costs accuracy:
            ``none``, ``gelu``, ``softmax``, ``layernorm`` or ``nonlinear`` (all three).
        layer_force_dequant: layer number -> the same, in place of ``force_dequant``.
        equalization: ``gamma`` moves the gain of each norm before a matrix product into the matrix, ``smooth`` a
            per-channel factor that balances the two; the float model stays the same function. Both need
            pre-layer-norm. ``auto`` is ``smooth`` there, and ``none`` with post-layer-norm.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    attention_bits: int = 8
    residual_bits: int = 16
    observer: str = "min_max"
    momentum: float = 0.95
    percentile: float = 99.99
    force_dequant: str = "none"
    layer_force_dequant: Mapping[int, str] = field(default_factory=dict)
    equalization: str = "auto"

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "attention_bits"):
            if getattr(self, name) not in (7, 8):
                raise UserError(f"{name} is {getattr(self, name)!r}: give 8 or 7")
        if self.residual_bits not in _RESIDUAL_BITS:
            raise UserError(
                f"residual_bits is {self.residual_bits!r}: give {_RESIDUAL_BITS.start} to {_RESIDUAL_BITS.stop - 1}"
            )
        for what, value, known in (
            ("observer", self.observer, OBSERVERS),
            ("force_dequant", self.force_dequant, FORCE_DEQUANT),
            ("equalization", self.equalization, EQUALIZATIONS),
            *((f"layer_force_dequant[{n}]", kind, FORCE_DEQUANT) for n, kind in self.layer_force_dequant.items()),
        ):
            if value not in known:
                raise UserError(f"{what} is {value!r}: choose one of {', '.join(known)}")
        if not 0.0 <= self.momentum < 1.0:
            raise UserError(f"momentum is {self.momentum}: give 0 or more, and less than 1")
        if not 50.0 < self.percentile <= 100.0:
            raise UserError(f"percentile is {self.percentile}: give more than 50 and at most 100 (per cent)")

    def dequantized(self, layer: int | None = None) -> frozenset[str]:
        """The kinds of function that a layer (None: anything outside of layers) computes in floating point."""
        if layer is None:
            return FORCE_DEQUANT[self.force_dequant]
        return FORCE_DEQUANT[self.layer_force_dequant.get(layer, self.force_dequant)]
