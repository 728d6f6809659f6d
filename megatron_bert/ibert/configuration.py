# SPDX-License-Identifier: Apache-2.0
"""The configuration of an I-BERT model, with the field names of Hugging Face's IBertConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_bert.ibert.settings import FORCE_DEQUANT
from megatron_bert.model.configuration import EncoderConfig, explaining_names
from parallel.errors import UserError

#: Fields that have one value, and why.
_FIXED = {
    "layer_norm_placement": ("post", "I-BERT normalizes after each sum"),
    "hidden_act": ("gelu", "the integer function is made for the exact one"),
    "position_embedding_type": ("absolute", "I-BERT has no other"),
    "is_decoder": (False, "I-BERT is an encoder"),
    "add_cross_attention": (False, "I-BERT is an encoder"),
}


@explaining_names
@dataclass(kw_only=True)
class IBertEncoderConfig(EncoderConfig):
    """Sizes and constants of an I-BERT encoder: RoBERTa's, with post-layer-norm.

    Attributes:
        vocab_size: number of token ids in use.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of transformer layers.
        num_attention_heads: attention heads a layer; must divide hidden_size.
        intermediate_size: width of the feed-forward layer.
        hidden_act: ``gelu``.
        hidden_dropout_prob, attention_probs_dropout_prob: as in EncoderConfig.
        max_position_embeddings: rows of the position table. Padding has the position ``pad_token_id`` and real tokens
            those after it, so the longest sequence has ``max_position_embeddings - pad_token_id - 1`` tokens.
        type_vocab_size: number of token types; RoBERTa's models have 1.
        initializer_range: standard deviation of initial weights.
        layer_norm_eps: added to the variance in every layer norm.
        pad_token_id, bos_token_id, eos_token_id: ids of special tokens.
        position_embedding_type: ``absolute``.
        quant_mode: compute in integers, with straight-through gradients in training.
        force_dequant: functions left in floating point with quant_mode: ``none``, ``gelu``, ``softmax``, ``layernorm``,
            or ``nonlinear``, which is all three.
        scaled_output_init: initialize output projections with initializer_range / sqrt(2 * layers).
        layer_norm_placement: ``post``.

    The other fields are those of EncoderConfig.
    """

    model_type = "ibert"
    also_reads = frozenset({"roberta", "xlm-roberta"})
    like_roberta = True

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    pad_token_id: int = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    scaled_output_init: bool = False
    layer_norm_placement: str = "post"
    quant_mode: bool = False
    force_dequant: str = "none"

    def check(self) -> None:
        """Check every field.

        Raises:
            UserError: for the first that is wrong, with what it may be.
        """
        super().check()
        for name, (value, why) in _FIXED.items():
            if getattr(self, name) != value:
                raise UserError(f"model.{name} is {getattr(self, name)!r}, but {why}: leave it at {value!r}")
        if type(self.quant_mode) is not bool:
            raise UserError(f"model.quant_mode is {self.quant_mode!r}: give true or false")
        if not isinstance(self.force_dequant, str) or self.force_dequant not in FORCE_DEQUANT:
            raise UserError(f"model.force_dequant is {self.force_dequant!r}: choose one of {', '.join(FORCE_DEQUANT)}")
        if self.pad_token_id is None:
            raise UserError("model.pad_token_id is None, but positions are counted after it: give the id of padding")
        if self.max_position_embeddings < self.pad_token_id + 2:
            raise UserError(
                f"model.max_position_embeddings is {self.max_position_embeddings}, but positions start after "
                f"model.pad_token_id {self.pad_token_id}: give at least {self.pad_token_id + 2}"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields that have a value, and the model type; plain values that JSON can hold."""
        values = super().to_dict()
        del values["layer_norm_placement"]  # there is no other
        return values


IBertConfig = IBertEncoderConfig
