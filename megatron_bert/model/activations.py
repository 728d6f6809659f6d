# SPDX-License-Identifier: Apache-2.0
"""The activations between the two matrices of the feed-forward layers and in the masked-language head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch.nn.functional as F
from torch import Tensor

#: Just below the least value of GELU: the zero points of its asymmetric quantizer leave room for it.
LEAST_GELU = -0.17

#: hidden_act names that mean GELU, and what torch calls their approximation.
GELU_APPROXIMATIONS: Mapping[str, str] = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
#: Other names that transformers has for them: the same functions, computed in another order.
GELU_SYNONYMS: Mapping[str, str] = {
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_new",
}
#: hidden_act names and their functions, which act on each element; adding one is a line here, and for quantization one
#: in ``ibert/activations.py``.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: partial(F.gelu, approximate=approximation) for name, approximation in GELU_APPROXIMATIONS.items()},
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


def same_activation(one: str, other: str) -> bool:
    """Whether two hidden_act names mean the same function; names that are not known mean none."""
    return one == other or (one in ACTIVATIONS and other in ACTIVATIONS and _parts(one) == _parts(other))


def _parts(name: str) -> tuple[object, ...]:
    function = ACTIVATIONS[name]
    return (function.func, *function.keywords.items()) if isinstance(function, partial) else (function,)
