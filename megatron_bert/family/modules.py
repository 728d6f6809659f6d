# SPDX-License-Identifier: Apache-2.0
"""The one encoder under the module names of transformers' classes.

The layers of :mod:`megatron_bert.model` compute; what holds their parameters has the names and shapes that
transformers' classes have: query, key and value apart, embeddings of ``vocab_size`` rows. On a single device these are
plain ``nn.Linear``, ``nn.Embedding`` and ``nn.LayerNorm``, which tools that look for them by kind or by name may
replace. With tensor parallelism they are the parallel layers.

Shapes: T tokens, A heads on this rank, D head dimension, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from megatron_bert.family.attention import Attention, CrossAttention
from megatron_bert.family.parts import (
    Activation,
    Holder,
    activation,
    divided_linear,
    drop,
    dropout_prob,
    part,
    without_values,
)
from megatron_bert.model.configuration import EncoderConfig
from megatron_bert.model.encoder import BertEmbeddings, Encoder
from megatron_bert.model.heads import MaskedLanguageHead, Pooler, SequenceHead
from megatron_bert.model.layer import ATTENTION_OUTPUT, MLP_OUTPUT, TransformerLayer
from parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from parallel.mesh import TensorParallel


class FeedForward:
    """The two dense layers of a layer, as the encoder knows them."""

    def __init__(self, layer: EncoderLayer) -> None:
        self.intermediate, self.output, self.hidden_act = layer.intermediate, layer.output, layer.hidden_act

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[T, H]`` to the same."""
        return self.output(activation(self.hidden_act)(self.intermediate(hidden)))


class EncoderLayer(TransformerLayer, GradientCheckpointingLayer):
    """One transformer layer; transformers' base class computes it again in the backward pass where it is asked to."""

    attention: Attention
    cross_attention = part("crossattention")
    attention_norm = part("attention.ln", "attention.output.LayerNorm")
    cross_attention_norm = part("crossattention.ln", "crossattention.output.LayerNorm")
    mlp_norm = part("ln", "output.LayerNorm")

    def __init__(self, sizes: EncoderConfig, act: Activation, tp: TensorParallel) -> None:
        nn.Module.__init__(self)
        self.tp, self.recompute, self.hidden_act = tp, "none", act
        self.post_norm = sizes.layer_norm_placement == "post"
        size, wide = sizes.hidden_size, sizes.intermediate_size
        self.attention = Attention(sizes, tp)
        if sizes.add_cross_attention:
            self.crossattention = CrossAttention(sizes, tp)
        if not self.post_norm:
            self.ln = nn.LayerNorm(size, sizes.layer_norm_eps)
        norm = nn.LayerNorm(size, sizes.layer_norm_eps) if self.post_norm else None
        self.intermediate = Holder(divided_linear(ColumnParallelLinear, size, wide, tp))
        self.output = Holder(divided_linear(RowParallelLinear, wide, size, tp), norm, sizes.hidden_dropout_prob)

    def drops(self) -> bool:
        """Whether there is dropout anywhere in the layer."""
        return bool(self.dropout_at(MLP_OUTPUT)) or any(
            each.dropout_prob or dropout_prob(each.output.dropout)
            for each in (self.attention, self.cross_attention)
            if each is not None
        )

    def dropout_at(self, place: int) -> float:
        """Probability of dropout at a place of the layer."""
        if place == MLP_OUTPUT:
            return dropout_prob(self.output.dropout)
        return dropout_prob((self.attention if place == ATTENTION_OUTPUT else self.cross_attention).output.dropout)

    @property
    def mlp(self) -> FeedForward:  # type: ignore[override]
        """The two dense layers."""
        return FeedForward(self)


class LayerStack(Encoder):
    """All layers, and the final norm of pre-layer-norm."""

    final_norm = part("ln")

    def __init__(self, sizes: EncoderConfig, act: Activation, tp: TensorParallel) -> None:
        nn.Module.__init__(self)
        self.first_layer = 0
        self.layer = nn.ModuleList([EncoderLayer(sizes, act, tp) for _ in range(sizes.num_hidden_layers)])
        if sizes.layer_norm_placement == "pre":
            self.ln = nn.LayerNorm(sizes.hidden_size, sizes.layer_norm_eps)

    @property
    def layers(self) -> dict[str, nn.Module]:  # type: ignore[override]
        """The layers by number."""
        return {str(number): layer for number, layer in enumerate(self.layer)}


class Embeddings(BertEmbeddings):
    """Word, position and type embeddings; with relative positions the table of positions is there but not used."""

    norm = part("LayerNorm")

    def __init__(self, sizes: EncoderConfig, tp: TensorParallel) -> None:
        nn.Module.__init__(self)
        self.tp, self.dropout = tp, nn.Dropout(sizes.hidden_dropout_prob)
        self.absolute = sizes.position_embedding_type == "absolute"
        size = sizes.hidden_size
        #: Id whose embedding gets no gradient from where it is looked up; None where the table itself knows which.
        self.padding = None if tp.size == 1 else sizes.pad_token_id
        if tp.size == 1:
            self.word_embeddings = without_values(nn.Embedding, sizes.vocab_size, size, padding_idx=sizes.pad_token_id)
        else:
            self.word_embeddings = VocabParallelEmbedding(
                sizes.vocab_size, sizes.padded_vocab_size, size, init_std=0.0, tp=tp
            )
        self.position_embeddings = without_values(
            nn.Embedding, sizes.max_position_embeddings, size, padding_idx=sizes.padding_position
        )
        self.token_type_embeddings = without_values(nn.Embedding, sizes.type_vocab_size, size)
        if sizes.layer_norm_placement == "post":
            self.LayerNorm = nn.LayerNorm(size, sizes.layer_norm_eps)

    @property
    def dropout_prob(self) -> float:  # type: ignore[override]
        """Of the embeddings."""
        return dropout_prob(self.dropout)

    def _words(self, tokens: Tensor | None) -> Tensor:
        """Words of ``[B, S]`` or ``[T]``, as ``[T, H]``."""
        words = super()._words(tokens)
        if tokens is not None and self.padding is not None and torch.is_grad_enabled():
            words = torch.where((tokens == self.padding)[..., None], words.detach(), words)
        return words.flatten(0, -2)


def with_tanh(dense: nn.Module, x: Tensor) -> Tensor:
    """A dense layer and tanh; quantized poolers compute both."""
    return dense(x) if isinstance(dense, Pooler) else torch.tanh(dense(x))


class PoolerLayer(nn.Module):
    """Dense and tanh, on the first token of a sequence."""

    followed_by_tanh = ("dense",)

    def __init__(self, sizes: EncoderConfig) -> None:
        super().__init__()
        self.dense = without_values(nn.Linear, sizes.hidden_size, sizes.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, H]`` to the same."""
        return with_tanh(self.dense, x)


class LanguageHead(MaskedLanguageHead):
    """The masked-language head; its output matrix is the word embeddings unless they are not tied."""

    def __init__(self, sizes: EncoderConfig, act: Activation, tp: TensorParallel) -> None:
        nn.Module.__init__(self)
        self.tp, self.hidden_act = tp, act  # type: ignore[assignment]
        self._make_transform(sizes)
        rows = sizes.vocab_size if tp.size == 1 else sizes.padded_vocab_size
        self.decoder = divided_linear(ColumnParallelLinear, sizes.hidden_size, rows, tp)
        assert self.decoder.bias is not None
        self.bias = self.decoder.bias

    def _make_transform(self, sizes: EncoderConfig) -> None:
        raise NotImplementedError

    def forward(self, selected: Tensor, word_embeddings: Tensor | None = None) -> Tensor:
        """``[K, H]`` to this rank's part of the logits, ``[K, V/t]``."""
        del word_embeddings
        return self.decoder(self.norm(activation(self.hidden_act)(self.dense(selected))))


class Predictions(LanguageHead):
    """The masked-language head as MegatronBERT names its parts."""

    dense, norm = part("transform.dense"), part("transform.LayerNorm")

    def _make_transform(self, sizes: EncoderConfig) -> None:
        dense = without_values(nn.Linear, sizes.hidden_size, sizes.hidden_size)
        self.transform = Holder(dense, nn.LayerNorm(sizes.hidden_size, sizes.layer_norm_eps))


class RobertaLanguageHead(LanguageHead):
    """The masked-language head as RoBERTa names its parts."""

    norm = part("layer_norm")

    def _make_transform(self, sizes: EncoderConfig) -> None:
        self.dense = without_values(nn.Linear, sizes.hidden_size, sizes.hidden_size)
        self.layer_norm = nn.LayerNorm(sizes.hidden_size, sizes.layer_norm_eps)


class RobertaSequenceHead(SequenceHead):
    """RoBERTa's head on the first token of a sequence: dense, tanh and dense, with dropout before both."""

    followed_by_tanh = ("dense",)

    def __init__(self, sizes: EncoderConfig) -> None:
        nn.Module.__init__(self)
        self.dense = without_values(nn.Linear, sizes.hidden_size, sizes.hidden_size)
        self.dropout = nn.Dropout(sizes.classifier_dropout_prob)
        self.out_proj = without_values(nn.Linear, sizes.hidden_size, sizes.num_labels)

    def _drop(self, features: Tensor, dropout_keys: Tensor | None) -> Tensor:
        return drop(features, self.dropout, dropout_keys)

    def _inner(self, first_tokens: Tensor) -> Tensor:
        return with_tanh(self.dense, first_tokens)
