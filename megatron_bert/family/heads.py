# SPDX-License-Identifier: Apache-2.0
"""The base of classes with a head on the encoder."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from megatron_bert.family.encoder import EncoderModel
from megatron_bert.family.pretrained import DocumentedModel


class HeadModel(DocumentedModel):
    """An encoder under the family's name for it, for a head to go on from; arguments as of DocumentedModel."""

    encoder_class: ClassVar[type[EncoderModel]]
    #: Whether the encoder has a pooler.
    pooled: ClassVar[bool] = True

    def build(self, **parts: Any) -> None:
        """Make the encoder."""
        pooled = parts.get("pooled", self.pooled)
        encoder = self.encoder_class(
            self.config, pooled, tp=self.tp, skip_padding=self._skip_padding, initial=False, device=None
        )
        self.add_module(self.base_model_prefix, encoder)

    def learns_from(self, labels: Tensor | None) -> bool:
        """Whether this is a training step, of which only the loss is of use, not what the head gives at padding."""
        return self.training and labels is not None
