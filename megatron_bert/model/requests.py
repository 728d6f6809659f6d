# SPDX-License-Identifier: Apache-2.0
"""What can be asked of the encoder beyond the last hidden states, and what it then gives.

Pretraining asks nothing of this and passes no request, which is the fast path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from megatron_bert.model.movable import Movable


class LayerMemory(Protocol):
    """What one layer of a decoder keeps for later passes: keys and values, ``[B, heads on this rank, K, D]`` each."""

    def grown(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep those of these tokens; the result are those of all that are attended to."""

    def of_encoder(self, project: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Those of the encoder's states, which are projected the first time alone."""


@dataclass(frozen=True, kw_only=True)
class EncoderStates(Movable):
    """What a decoder's cross-attention looks at.

    Attributes:
        hidden: ``[B * E, H]`` final hidden states of the encoder; None where keys and values are cached.
        length: E.
        mask: as of AttentionRequest, with E in place of K.
        unattended: some query may attend to none.
    """

    hidden: Tensor | None
    length: int
    mask: Tensor | None = None
    unattended: bool = False


@dataclass(frozen=True, kw_only=True)
class AttentionRequest(Movable):
    """What one layer is asked. Sequences stand in a rectangle of B times Q tokens.

    Attributes:
        mask: broadcastable to ``[B, all heads, Q, K]``: bool, true where a key may be attended to; or what is added to
            the scores; None when all may.
        unattended: some query may attend to none, which the fused kernels do not take.
        probabilities: give the attention probabilities.
        head_mask: what they are multiplied with, broadcastable to ``[B, all heads, Q, K]``.
        memory: keeps keys and values, those of earlier tokens included.
        first: position of the first query.
        encoder: what to attend to besides; decoders only.
    """

    mask: Tensor | None = None
    unattended: bool = False
    probabilities: bool = False
    head_mask: Tensor | None = None
    memory: LayerMemory | None = None
    first: int = 0
    encoder: EncoderStates | None = None


class LayerOutput(NamedTuple):
    """What a layer gives on request.

    Attributes:
        hidden: ``[T, H]``.
        attentions, cross_attentions: ``[B, heads, Q, K or E]``, if asked for.
    """

    hidden: Tensor
    attentions: Tensor | None
    cross_attentions: Tensor | None


@dataclass(frozen=True, kw_only=True)
class EncoderRequest:
    """What the stack of layers is asked.

    Attributes:
        layers: what each layer is asked; None when their attention is plain.
        shown: gives the hidden states before each layer and at the end: makes of them the tensor that is given, and the
            hidden states to go on from, which are computed from it, so that gradients reach what is given.
    """

    layers: tuple[AttentionRequest, ...] | None = None
    shown: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True, kw_only=True)
class EncoderOutput:
    """What the stack of layers gives on request; tuples have an entry a layer, and are empty if not asked for.

    Attributes:
        hidden: ``[T, H]``, after the final norm where there is one.
        hidden_states: before the first layer, after each layer but the last, and ``hidden``.
        attentions, cross_attentions: ``[B, heads, Q, K or E]``.
    """

    hidden: Tensor
    hidden_states: tuple[Tensor, ...] = ()
    attentions: tuple[Tensor, ...] = ()
    cross_attentions: tuple[Tensor, ...] = ()
