# SPDX-License-Identifier: Apache-2.0
"""An activation."""

import torch.nn.functional as F
from torch import Tensor


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al., arXiv 2109.08668)."""
    return F.relu(x).square()
