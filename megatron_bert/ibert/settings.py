# SPDX-License-Identifier: Apache-2.0
"""How a model is quantized."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from megatron_bert.section import Section, explained

Dequantized = Literal["none", "gelu", "softmax", "layernorm", "nonlinear"]
#: What can be computed in floating point from dequantized values, and the kinds it stands for.
FORCE_DEQUANT: dict[Dequantized, frozenset[str]] = {
    "none": frozenset(),
    "gelu": frozenset({"gelu"}),
    "softmax": frozenset({"softmax"}),
    "layernorm": frozenset({"layernorm"}),
    "nonlinear": frozenset({"gelu", "softmax", "layernorm"}),
}


class QuantizationConfig(Section):
    """Bit widths, range observers and exceptions of a quantized model; see docs/ibert.md.

    Raises:
        UserError: a value that a field cannot have.
    """

    weight_bits: Literal[7, 8] = Field(
        8,
        description="Of weights; with 7, sums of two products stay exact in the 16 bits in which CPUs without "
        "dot-product instructions add them.",
    )
    activation_bits: Literal[7, 8] = Field(8, description="Of the inputs of matrix products with weights.")
    attention_bits: Literal[7, 8] = Field(
        8, description="Of queries, keys and values; with 7, the same holds for the products of attention."
    )
    residual_bits: int = Field(16, ge=10, le=16, description="Of the residual stream and tensors between modules.")
    observer: Literal["min_max", "percentile", "mse"] = Field(
        "min_max",
        description="What makes ranges of the inputs of matrix products: their largest magnitude averaged over "
        "batches, or a percentile or the least squared error of a histogram of all batches. Only min_max ranges follow "
        "training. The residual stream always has its largest magnitude.",
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="min_max: of the average over batches.")
    percentile: float = Field(99.99, gt=50, le=100, description="percentile: per cent of elements inside the range.")
    force_dequant: Dequantized = Field(
        "none",
        description="Kind of function computed in floating point from dequantized values, to find out what costs "
        "accuracy; nonlinear is all three.",
    )
    layer_force_dequant: dict[int, Dequantized] = Field(
        default_factory=dict, description="The same for single layers: {number: kind}."
    )
    equalization: Literal["auto", "none", "gamma", "smooth"] = Field(
        "auto",
        description="Balance channels first, with the same float function: move norms' gains into the next matrix "
        "(gamma), or per-channel factors (smooth), both where norms come first. auto: smooth there, as in "
        "MegatronBERT; elsewhere none.",
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explained(error, type(self)) from None

    def dequantized(self, layer: int | None = None) -> frozenset[str]:
        """The kinds of function that a layer (None: anything outside of layers) computes in floating point."""
        if layer is None:
            return FORCE_DEQUANT[self.force_dequant]
        return FORCE_DEQUANT[self.layer_force_dequant.get(layer, self.force_dequant)]
