# SPDX-License-Identifier: Apache-2.0
"""What modules under transformers' names are made of: linear layers, levels of names, and where parts stand in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from megatron_bert.convert.huggingface_names import fuse
from megatron_bert.model.activations import ACTIVATIONS
from megatron_bert.model.effective_weights import effective_weight
from parallel.dropout import keyed_dropout
from parallel.errors import UserError
from parallel.layers import ColumnParallelLinear, RowParallelLinear
from parallel.mesh import TensorParallel
from parallel.sharding import local_tensor

Activation = str | Callable[[Tensor], Tensor]
Linear = nn.Linear | ColumnParallelLinear | RowParallelLinear


def part(*paths: str) -> Any:
    """A property of a module: its part at the first of some paths where there is one, else None."""
    steps = tuple(tuple(path.split(".")) for path in paths)

    def found(module: nn.Module) -> Any:
        place: Any = None
        for names in steps:
            place = module
            for name in names:
                place = getattr(place, name, None)
            if place is not None:
                break
        return place

    return property(found)


def activation(act: Activation) -> Callable[[Tensor], Tensor]:
    """The function of a ``hidden_act``: a name of transformers' activations, or the function itself."""
    if not isinstance(act, str):
        return act
    return ACTIVATIONS[act] if act in ACTIVATIONS else ACT2FN[act]


def without_values(make: Callable[..., nn.Module], *sizes: Any, **options: Any) -> Any:
    """A module whose parameters hold no values yet, on the device that is torch's default at the moment."""
    if make is nn.Embedding:  # of a table: made otherwise it draws one, which takes time even where there are no values
        return nn.Embedding.from_pretrained(torch.empty(*sizes), freeze=False, **options)
    return make(*sizes, device="meta", **options).to_empty(device=torch.get_default_device())


def divided_linear(
    kind: type[ColumnParallelLinear | RowParallelLinear], inputs: int, outputs: int, tp: TensorParallel
) -> Linear:
    """A linear layer whose outputs or inputs are divided over the tensor ranks; torch's own on a single one."""
    if tp.size == 1:
        return without_values(nn.Linear, inputs, outputs)
    return kind(inputs, outputs, init_std=0.0, tp=tp)


def dropout_prob(dropout: nn.Module) -> float:
    """The probability of a dropout module, which is all that it holds here; 0 in evaluation.

    Raises:
        UserError: somebody has put another kind of module there, or 1 as its probability.
    """
    if not dropout.training or isinstance(dropout, nn.Identity):
        return 0.0
    if type(dropout) is not nn.Dropout or not 0.0 <= dropout.p < 1.0:
        raise UserError(f"a dropout module is {dropout}: give nn.Dropout of less than 1, or nn.Identity")
    return dropout.p


def drop(features: Tensor, dropout: nn.Module, dropout_keys: Tensor | None) -> Tensor:
    """Dropout before a head, ``[N, H]`` with a key per row; none without keys."""
    return features if dropout_keys is None else keyed_dropout(features, dropout_prob(dropout), dropout_keys)


class Holder(nn.Module):
    """A level of names: its ``dense`` layer, and perhaps the norm that follows the sum, and dropout before that."""

    def __init__(self, dense: Linear, norm: nn.LayerNorm | None = None, dropout: float | None = None) -> None:
        super().__init__()
        self.dense = dense
        if norm is not None:
            self.LayerNorm = norm
        if dropout is not None:
            self.dropout = nn.Dropout(dropout)

    @property
    def in_features(self) -> int:
        """Of the dense layer."""
        return self.dense.in_features

    @property
    def weight(self) -> Tensor:
        """Of the dense layer, with its adapters."""
        return effective_weight(self.dense)

    @property
    def bias(self) -> Tensor | None:
        """Of the dense layer."""
        return self.dense.bias

    def forward(self, x: Tensor) -> Tensor:
        """The dense layer."""
        return self.dense(x)


class Fused:
    """Linear layers side by side as one whose rows are ordered ``[heads, layers, head_dim]``."""

    def __init__(self, layers: list[Linear], head_dim: int) -> None:
        self.layers, self.head_dim = layers, head_dim

    def __call__(self, x: Tensor) -> Tensor:
        """``[T, H]`` to ``[T, A * layers * D]``."""
        parts = [layer(x).unflatten(-1, (-1, self.head_dim)) for layer in self.layers]
        return torch.stack(parts, dim=-2).flatten(-3)

    @property
    def weight(self) -> Tensor:
        """This rank's rows, ``[A * layers * D, H]``, with adapters."""
        return self._rows([effective_weight(layer) for layer in self.layers])

    @property
    def bias(self) -> Tensor | None:
        """This rank's part, ``[A * layers * D]``."""
        return self._rows([layer.bias for layer in self.layers if layer.bias is not None])

    def _rows(self, parts: list[Tensor]) -> Tensor:
        return fuse([local_tensor(part) for part in parts], self.head_dim)
