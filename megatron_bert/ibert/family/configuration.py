# SPDX-License-Identifier: Apache-2.0
"""The documented configuration of I-BERT."""

from __future__ import annotations

from typing import Any, ClassVar

from megatron_bert.family.configuration import DocumentedConfig
from megatron_bert.ibert.settings import FORCE_DEQUANT
from megatron_bert.model.configuration import EncoderConfig, RobertaConfig
from megatron_bert.model.configuration_checks import check_choice, check_switch


class IBertConfig(DocumentedConfig):
    """Sizes and constants of an I-BERT encoder: RoBERTa's, with post-layer-norm.

    Attributes:
        max_position_embeddings: rows of the position table. Padding has the position ``pad_token_id`` and real tokens
            those after it, so the longest sequence has ``max_position_embeddings - pad_token_id - 1`` tokens.
        type_vocab_size: number of token types; RoBERTa's models have 1.
        hidden_act: ``gelu``.
        position_embedding_type: ``absolute``.
        quant_mode: compute in integers, with straight-through gradients in training.
        force_dequant: functions left in floating point with quant_mode: ``none``, ``gelu``, ``softmax``, ``layernorm``,
            or ``nonlinear``, which is all three.

    The other fields are those of MegatronBertConfig.
    """

    model_type = "ibert"
    encoder_class: ClassVar[type[EncoderConfig]] = RobertaConfig
    takes_every_activation: ClassVar[bool] = False
    _others: ClassVar[tuple[str, ...]] = ("dtype", "quant_mode", "force_dequant")

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    scaled_output_init: bool = False
    quant_mode: bool = False
    force_dequant: str = "none"

    def _checked(self, **others: Any) -> EncoderConfig:
        check_switch("quant_mode", self.quant_mode)
        check_choice("force_dequant", self.force_dequant, tuple(FORCE_DEQUANT))
        return super()._checked(**others)
