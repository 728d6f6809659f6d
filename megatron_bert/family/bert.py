# SPDX-License-Identifier: Apache-2.0
"""MegatronBertModel: the encoder (or decoder) without a head.

Shapes: B sequences, S tokens of each, H hidden size, P cached tokens, E tokens of an encoder.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from megatron_bert.family.arguments import shared_arguments
from megatron_bert.family.encoder import EncoderModel, HeadModel
from megatron_bert.family.pretrained import MegatronBertPreTrainedModel


class MegatronBertModel(MegatronBertPreTrainedModel, EncoderModel):
    """Hidden states of every token, and the pooled first token of every sequence; arguments as of EncoderModel."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, ...], ...] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Tensor | None, ...]:
        """Encode a batch.

        Args:
            input_ids: int64 ``[B, S]``; this or ``inputs_embeds``.
            attention_mask: 1 for tokens that count: ``[B, P + S]``; or for pairs that may attend: ``[B, S, P + S]``, or
                ``[B, heads, S, P + S]``, there of floating point as what is added to scores. B, heads and S may be 1.
            token_type_ids: int64 ``[B, S]`` or ``[1, S]``; 0 by default.
            position_ids: int64 ``[B, S]`` or ``[1, S]``; P, P + 1, .. by default.
            head_mask: ``[heads]`` or ``[layers, heads]``; what the probabilities of a head are multiplied with.
            inputs_embeds: ``[B, S, H]``, in place of word embeddings.
            encoder_hidden_states: ``[B, E, H]``, what cross-attention looks at.
            encoder_attention_mask: as ``attention_mask``, with E in place of P + S.
            past_key_values: what an earlier pass of a decoder returned, or what stands before an encoder's tokens.
            use_cache: return keys and values; by default what ``config`` says, for decoders.
            output_attentions, output_hidden_states, return_dict: by default what ``config`` says.

        Returns:
            The fields of the output; as a tuple without ``return_dict``.

        Raises:
            UserError: an argument of a wrong shape, or out of range.
        """
        return self.output(shared_arguments(locals()), return_dict)


class MegatronBertHeadModel(MegatronBertPreTrainedModel, HeadModel):
    """The base of the classes with a head, on a MegatronBertModel."""

    encoder_class: ClassVar[type[EncoderModel]] = MegatronBertModel
