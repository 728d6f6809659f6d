"""The base of classes with a head on the encoder."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from megatron_bert.family.encoder import EncoderModel
from megatron_bert.family.pretrained import PreTrainedModel
from megatron_bert.model.configuration import MegatronBertConfig
from parallel.mesh import TensorParallel


class HeadModel(PreTrainedModel):
    """An encoder under the family's name for it, for a head to go on from.

    Args:
        config: sizes and options.
        pooled: whether the encoder has a pooler.
        tp, skip_padding, device: as in EncoderModel.
    """

    encoder_class: ClassVar[type[EncoderModel]]

    def __init__(
        self,
        config: MegatronBertConfig,
        pooled: bool,
        tp: TensorParallel,
        skip_padding: bool | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__(config, tp, None)
        encoder = self.encoder_class(config, pooled, tp=tp, skip_padding=skip_padding, initial=False, device=device)
        self.add_module(self.base_model_prefix, encoder)

    def learns_from(self, labels: Tensor | None) -> bool:
        """Whether this is a training step, of which only the loss is of use, not what the head gives at padding."""
        return self.training and labels is not None
