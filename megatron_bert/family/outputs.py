# SPDX-License-Identifier: Apache-2.0
"""The one output that transformers has in the module of its class only.

Shapes: B sequences, S tokens of each, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import ModelOutput


@dataclass
class MegatronBertForPreTrainingOutput(ModelOutput):
    """Losses of masked words and sentence pairs, summed, with logits ``[B, S, V]`` and ``[B, 2]``."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
