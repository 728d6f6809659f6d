# SPDX-License-Identifier: Apache-2.0
"""The formulas of I-BERT (arXiv 2101.01321) and of what it is compared with there, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """x Phi(x)."""
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def sigmoid_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def h_gelu(x: Tensor) -> Tensor:
    """x ReLU6(1.702 x + 3) / 6."""
    return x * (1.702 * x + 3.0).clamp(0.0, 6.0) / 6.0


def i_gelu(x: Tensor) -> Tensor:
    """x / 2 (1 + L(x / sqrt 2)), L(x) = sgn(x) (a (min(|x|, -b) + b)^2 + 1), equations 7 and 8."""
    a, b = -0.2888, -1.769
    y = x / math.sqrt(2.0)
    return x / 2 * (1.0 + y.sign() * (a * (y.abs().clamp(max=-b) + b).square() + 1.0))


def i_exp(x: Tensor, *, repository: bool = False) -> Tensor:
    """L(p) >> z with x = -z ln 2 + p, equations 11 to 13; with the coefficients of the paper or of its code."""
    z = torch.floor(-x / math.log(2.0))
    p = x + z * math.log(2.0)
    if repository:
        polynomial = 0.35815147 * p.square() + 0.96963238 * p + 1.0
    else:
        polynomial = 0.3585 * (p + 1.353).square() + 0.344
    return polynomial * torch.exp2(-z)


def i_sqrt_steps(n: int) -> int:
    """Divisions that algorithm 4 does before it stops."""
    if n == 0:
        return 0
    x = 2 ** math.ceil(n.bit_length() / 2)
    for step in range(1, 64):
        better = (x + n // x) // 2
        if better >= x:
            return step
        x = better
    raise AssertionError(n)
