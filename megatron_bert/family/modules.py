# SPDX-License-Identifier: Apache-2.0
"""The one encoder under the module names of transformers' classes.

The layers of :mod:`megatron_bert.model` compute; what holds their parameters has the names and shapes that
transformers' classes have: query, key and value apart, embeddings of ``vocab_size`` rows. On a single device these are
plain ``nn.Linear``, ``nn.Embedding`` and ``nn.LayerNorm``, which tools that look for them by kind or by name may
replace. With tensor parallelism they are the parallel layers.

Shapes: T tokens, A heads on this rank, D head dimension, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from megatron_bert.convert.huggingface_names import fuse
from megatron_bert.model.activations import ACTIVATIONS
from megatron_bert.model.attention import SCORES_PER_SEQUENCE, AttentionHeads, DistanceTable, SelfAttention, in_parts
from megatron_bert.model.configuration import EncoderConfig
from megatron_bert.model.cross_attention import CrossAttention
from megatron_bert.model.effective_weights import effective_weight
from megatron_bert.model.encoder import BertEmbeddings, Encoder
from megatron_bert.model.heads import MaskedLanguageHead, Pooler, SequenceHead
from megatron_bert.model.layer import ATTENTION_OUTPUT, MLP_OUTPUT, TransformerLayer
from megatron_bert.model.requests import AttentionOutput, AttentionRequest
from megatron_bert.model.resharding import selected
from megatron_bert.model.sequences import SequenceLayout
from parallel.dropout import keyed_dropout
from parallel.errors import UserError
from parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from parallel.mesh import TensorParallel
from parallel.recompute import Recompute
from parallel.sharding import local_size, local_tensor

Activation = str | Callable[[Tensor], Tensor]
Linear = nn.Linear | ColumnParallelLinear | RowParallelLinear


def activation(act: Activation) -> Callable[[Tensor], Tensor]:
    """The function of a ``hidden_act``: a name of transformers' activations, or the function itself."""
    if not isinstance(act, str):
        return act
    return ACTIVATIONS[act] if act in ACTIVATIONS else ACT2FN[act]


def without_values(make: Callable[..., nn.Module], *sizes: Any, **options: Any) -> Any:
    """A module whose parameters hold no values yet, on the device that is torch's default at the moment."""
    return make(*sizes, device="meta", **options).to_empty(device=torch.get_default_device())


def column_linear(inputs: int, outputs: int, tp: TensorParallel) -> Linear:
    """A linear layer whose outputs are divided over the tensor ranks."""
    if tp.size == 1:
        return without_values(nn.Linear, inputs, outputs)
    return ColumnParallelLinear(inputs, outputs, init_std=0.0, tp=tp)


def row_linear(inputs: int, outputs: int, tp: TensorParallel) -> Linear:
    """A linear layer whose inputs are divided over the tensor ranks."""
    if tp.size == 1:
        return without_values(nn.Linear, inputs, outputs)
    return RowParallelLinear(inputs, outputs, init_std=0.0, tp=tp)


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


class DistanceEmbedding(DistanceTable, nn.Embedding):  # type: ignore[misc]
    """A vector for each distance of two positions, under the name of transformers 4."""

    def __init__(self, sizes: EncoderConfig, tp: TensorParallel) -> None:
        nn.Embedding.__init__(self, 2 * sizes.max_position_embeddings - 1, sizes.head_dim, device="meta")
        self.to_empty(device=torch.get_default_device())
        self.tp, self.both = tp, sizes.position_embedding_type == "relative_key_query"


class Projections(nn.Module):
    """Query, key and value of one attention module, and its table of distances."""

    def __init__(self, sizes: EncoderConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.query = column_linear(sizes.hidden_size, sizes.hidden_size, tp)
        self.key = column_linear(sizes.hidden_size, sizes.hidden_size, tp)
        self.value = column_linear(sizes.hidden_size, sizes.hidden_size, tp)
        self.dropout = nn.Dropout(sizes.attention_probs_dropout_prob)
        if sizes.position_embedding_type != "absolute":
            self.distance_embedding = DistanceEmbedding(sizes, tp)


class _Attention(AttentionHeads):
    """The levels of names of an attention module; with post-layer-norm the norm stands in its output."""

    def __init__(self, sizes: EncoderConfig, tp: TensorParallel, recompute: Recompute = "none") -> None:
        nn.Module.__init__(self)
        self.count_heads(sizes, tp, recompute)
        post = sizes.layer_norm_placement == "post"
        if not post:
            self.ln = nn.LayerNorm(sizes.hidden_size, sizes.layer_norm_eps)
        self.add_module("self", Projections(sizes, tp))
        norm = nn.LayerNorm(sizes.hidden_size, sizes.layer_norm_eps) if post else None
        self.output = Holder(row_linear(sizes.hidden_size, sizes.hidden_size, tp), norm, sizes.hidden_dropout_prob)

    @property
    def dropout_prob(self) -> float:  # type: ignore[override]
        """Of attention probabilities."""
        return dropout_prob(self.projections.dropout)

    @property
    def projections(self) -> Projections:
        """Query, key and value."""
        return self._modules["self"]  # type: ignore[return-value]

    @property
    def norm(self) -> nn.LayerNorm:
        """The norm before the module, or after its sum."""
        return self.output.LayerNorm if "ln" not in self._modules else self.ln

    @property
    def distance(self) -> DistanceTable | None:  # type: ignore[override]
        """The table of distances, with relative positions."""
        return getattr(self.projections, "distance_embedding", None)


class Attention(_Attention, SelfAttention):  # type: ignore[misc]
    """Self-attention."""

    @property
    def query_key_value(self) -> Fused:  # type: ignore[override]
        """The three projections as one."""
        own = self.projections
        return Fused([own.query, own.key, own.value], self.head_dim)

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        dropout_keys: Tensor | None,
        request: AttentionRequest | None = None,
    ) -> Tensor | AttentionOutput:
        """Attend within sequences; without a request, the projections are not put side by side first."""
        own = self.projections
        if request is not None or (layout.is_packed and not in_parts(hidden)):
            return super().forward(hidden, layout, dropout_keys, request)
        qkv = tuple(
            linear(hidden).unflatten(-1, (self.heads, self.head_dim)) for linear in (own.query, own.key, own.value)
        )
        parts = layout.parts(SCORES_PER_SEQUENCE // self.heads) if layout.is_packed else [layout]
        sizes = [hidden.shape[0]] if len(parts) == 1 else [sum(part.lengths) for part in parts]
        all_keys = [None] * len(parts) if dropout_keys is None else dropout_keys.split(sizes)
        each = zip(parts, *(part.split(sizes) for part in qkv), all_keys, strict=True)
        contexts = [self._within(*part) for part in each]
        return self.output((contexts[0] if len(contexts) == 1 else torch.cat(contexts)).flatten(-2))

    def _within(
        self, layout: SequenceLayout, query: Tensor, key: Tensor, value: Tensor, dropout_keys: Tensor | None
    ) -> Tensor:
        """Projections ``[T, A, D]`` of sequences in a rectangle, and dropout keys ``[T]``, to ``[T, A, D]``."""
        query, key, value = (layout.to_rectangle(tokens).transpose(1, 2) for tokens in (query, key, value))
        rectangle_keys = None if dropout_keys is None else layout.to_rectangle(dropout_keys)
        context, _ = self.attend(query, key, value, layout.rectangle_mask(), rectangle_keys)
        return layout.from_rectangle(context.transpose(1, 2))

    def places_without(self, heads: Collection[int]) -> list[int]:
        """Places of the heads of all ranks that remain without some, which are given by their original numbers.

        Raises:
            UserError: the tensor size does not divide their number.
        """
        kept = [place for place, number in enumerate(self.numbers) if number not in heads]
        local_size(len(kept), self.tp, "the number of heads that remain in a layer")
        return kept

    def prune(self, heads: Collection[int]) -> None:
        """Remove heads, by their original numbers; those that are gone already do not matter.

        The parameters are replaced by smaller ones; under tensor parallelism the remaining heads are redistributed.

        Raises:
            UserError: the tensor size does not divide the rest.
        """
        kept = self.places_without(heads)
        count, own = len(kept) // self.tp.size, self.projections
        rows = (torch.tensor(kept)[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()
        for linear in (own.query, own.key, own.value):
            linear.weight = selected(linear.weight, rows, self.tp, dim=0)  # type: ignore[arg-type]
            assert linear.bias is not None
            linear.bias = selected(linear.bias, rows, self.tp, dim=0)
            linear.out_features = len(rows)
        output = self.output.dense
        output.weight = selected(output.weight, rows, self.tp, dim=1)  # type: ignore[arg-type]
        output.in_features = len(rows)
        self.numbers = [self.numbers[place] for place in kept]
        self.heads, self.first_head = count, self.tp.rank * count


class CrossAttentionModule(_Attention, CrossAttention):  # type: ignore[misc]
    """Attention of a decoder to an encoder."""

    @property
    def query(self) -> Linear:  # type: ignore[override]
        """The projection of the decoder's states."""
        return self.projections.query

    @property
    def key_value(self) -> Fused:  # type: ignore[override]
        """The projections of the encoder's states as one."""
        return Fused([self.projections.key, self.projections.value], self.head_dim)


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

    def __init__(self, sizes: EncoderConfig, act: Activation, tp: TensorParallel) -> None:
        nn.Module.__init__(self)
        self.tp, self.recompute, self.hidden_act = tp, "none", act
        self.post_norm = sizes.layer_norm_placement == "post"
        size, wide = sizes.hidden_size, sizes.intermediate_size
        self.attention = Attention(sizes, tp)
        if sizes.add_cross_attention:
            self.crossattention = CrossAttentionModule(sizes, tp)
        if not self.post_norm:
            self.ln = nn.LayerNorm(size, sizes.layer_norm_eps)
        norm = nn.LayerNorm(size, sizes.layer_norm_eps) if self.post_norm else None
        self.intermediate = Holder(column_linear(size, wide, tp))
        self.output = Holder(row_linear(wide, size, tp), norm, sizes.hidden_dropout_prob)

    def drops(self) -> bool:
        """Whether there is dropout anywhere in the layer."""
        attentions = [self.attention, *([self.crossattention] if "crossattention" in self._modules else [])]
        return bool(self.dropout_at(MLP_OUTPUT)) or any(
            each.dropout_prob or dropout_prob(each.output.dropout) for each in attentions
        )

    def dropout_at(self, place: int) -> float:
        """Probability of dropout at a place of the layer."""
        if place == MLP_OUTPUT:
            return dropout_prob(self.output.dropout)
        return dropout_prob((self.attention if place == ATTENTION_OUTPUT else self.crossattention).output.dropout)

    @property
    def attention_norm(self) -> nn.LayerNorm:  # type: ignore[override]
        """The norm of self-attention."""
        return self.attention.norm

    @property
    def cross_attention(self) -> CrossAttentionModule:  # type: ignore[override]
        """Attention to an encoder; of decoders that have it."""
        return self.crossattention

    @property
    def cross_attention_norm(self) -> nn.LayerNorm:  # type: ignore[override]
        """Its norm."""
        return self.cross_attention.norm

    @property
    def mlp(self) -> FeedForward:  # type: ignore[override]
        """The two dense layers."""
        return FeedForward(self)

    @property
    def mlp_norm(self) -> nn.LayerNorm:  # type: ignore[override]
        """The norm of the feed-forward part."""
        return self.output.LayerNorm if self.post_norm else self.ln


class LayerStack(Encoder):
    """All layers, and the final norm of pre-layer-norm."""

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

    @property
    def final_norm(self) -> nn.LayerNorm | None:  # type: ignore[override]
        """The norm at the end, if there is one."""
        return getattr(self, "ln", None)


class Embeddings(BertEmbeddings):
    """Word, position and type embeddings."""

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

    @property
    def norm(self) -> nn.LayerNorm | None:  # type: ignore[override]
        """The norm of the sum, with post-layer-norm."""
        return getattr(self, "LayerNorm", None)

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


class Transform(nn.Module):
    """Dense and norm of the masked-language head, as MegatronBERT names them."""

    def __init__(self, sizes: EncoderConfig) -> None:
        super().__init__()
        self.dense = without_values(nn.Linear, sizes.hidden_size, sizes.hidden_size)
        self.LayerNorm = nn.LayerNorm(sizes.hidden_size, sizes.layer_norm_eps)


class LanguageHead(MaskedLanguageHead):
    """The masked-language head; its output matrix is the word embeddings unless they are not tied."""

    def __init__(self, sizes: EncoderConfig, act: Activation, tp: TensorParallel) -> None:
        nn.Module.__init__(self)
        self.tp, self.hidden_act = tp, act  # type: ignore[assignment]
        self._make_transform(sizes)
        rows = sizes.vocab_size if tp.size == 1 else sizes.padded_vocab_size
        self.decoder = column_linear(sizes.hidden_size, rows, tp)
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

    def _make_transform(self, sizes: EncoderConfig) -> None:
        self.transform = Transform(sizes)

    @property
    def dense(self) -> nn.Linear:  # type: ignore[override]
        """The first dense layer."""
        return self.transform.dense

    @property
    def norm(self) -> nn.LayerNorm:  # type: ignore[override]
        """The norm after the activation."""
        return self.transform.LayerNorm


class RobertaLanguageHead(LanguageHead):
    """The masked-language head as RoBERTa names its parts."""

    def _make_transform(self, sizes: EncoderConfig) -> None:
        self.dense = without_values(nn.Linear, sizes.hidden_size, sizes.hidden_size)
        self.layer_norm = nn.LayerNorm(sizes.hidden_size, sizes.layer_norm_eps)

    @property
    def norm(self) -> nn.LayerNorm:  # type: ignore[override]
        """The norm after the activation."""
        return self.layer_norm


class PretrainingHeads(nn.Module):
    """The level of names above the heads of MegatronBERT's pretraining."""

    def __init__(self, predictions: Predictions | None, pairs: nn.Linear | None) -> None:
        super().__init__()
        if predictions is not None:
            self.predictions = predictions
        if pairs is not None:
            self.seq_relationship = pairs


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
