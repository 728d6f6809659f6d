# SPDX-License-Identifier: Apache-2.0
"""The integer function of an activation, and its gradient."""

import torch.nn.functional as F
from torch import Tensor

from megatron_bert.ibert.activations import IntegerActivation


def integer_squared_relu(x: Tensor, exponent: int) -> Tensor:
    """Rounded to the nearest, saturated to 16 bits."""
    square = x.clamp(min=0).long().square()
    return (square + (1 << (exponent - 1)) >> exponent).clamp(max=2**15 - 1).to(x.dtype)


def squared_relu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Of the real function."""
    return gradient * (2.0 * F.relu(x))


SQUARED_RELU = IntegerActivation(integer_squared_relu, squared_relu_backward, least=0.0)
