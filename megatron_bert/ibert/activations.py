# SPDX-License-Identifier: Apache-2.0
"""The table of activations that have an integer function. Adding one is a file with the function, and a line here."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_bert.ibert import gelu as integer_gelu
from megatron_bert.ibert.fixed_point import LARGEST_SHORT
from megatron_bert.model.activations import GELU_APPROXIMATIONS, LEAST_GELU


class IntegerActivation(NamedTuple):
    """The integer function of an activation, and the gradient of the real one.

    Attributes:
        function: of int32 or int64 from -32767 to 32767 with a scale of 2^-exponent, and the exponent, 1 to 13: results
            of the same type and scale, and of 16 bits.
        backward: of the gradient and the real argument, float32: the argument's gradient.
        least: at most the least result, which zero points leave room for; 0 or less.
        in_engines: whether integer engines have it: the specification alone computes what they do not have.
    """

    function: Callable[[Tensor, int], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    least: float
    in_engines: bool = False


#: By hidden_act.
INTEGER_ACTIVATIONS: dict[str, IntegerActivation] = {
    name: IntegerActivation(
        integer_gelu.gelu,
        partial(torch.ops.aten.gelu_backward, approximate=approximation),
        LEAST_GELU,
        in_engines=True,
    )
    for name, approximation in GELU_APPROXIMATIONS.items()
}


@cache
def all_results(function: Callable[[Tensor, int], Tensor], exponent: int, device: torch.device) -> Tensor:
    """Results for -32767 to 32767 in turn, carried in float64 ``[65535]``."""
    arguments = torch.arange(-LARGEST_SHORT, LARGEST_SHORT + 1, dtype=torch.int32, device=device)
    return function(arguments, exponent).double()
