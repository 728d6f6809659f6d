# SPDX-License-Identifier: Apache-2.0
"""The encoder: embeddings, a range of layers and, with pre-layer-norm, the final norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.layer import LayerNorm, TransformerLayer, own_tokens
from megatron_bert.model.requests import EncoderOutput, EncoderRequest, LayerOutput
from megatron_bert.model.sequences import SequenceLayout
from parallel.dropout import fold_in, hashed_columns, keyed_dropout
from parallel.layers import VocabParallelEmbedding
from parallel.mesh import SINGLE, TensorParallel
from parallel.recompute import Recompute
from parallel.sharding import Normal, ParallelModule


class TokenTable(ParallelModule):
    """A small embedding table (positions, types), whole on every tensor rank.

    Args:
        rows, size: of the table.
        init_std: standard deviation of initial values.
        divided: whether it sees only this rank's tokens (sequence parallelism), so its gradients are partial.
    """

    def __init__(self, rows: int, size: int, *, init_std: float, divided: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))
        self.initializers["weight"] = Normal(init_std)
        if divided:
            self.token_partial = ("weight",)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids ``[T]`` to rows ``[T, H]``."""
        return F.embedding(ids, self.weight)


class WordTable(nn.Module):
    """The word embeddings under their global name; on the last pipeline stage, whose head reads them, no others."""

    def __init__(self, config: MegatronBertConfig, *, tp: TensorParallel = SINGLE) -> None:
        super().__init__()
        rows, padded = config.vocab_size, config.padded_vocab_size
        self.word_embeddings = VocabParallelEmbedding(
            rows, padded, config.hidden_size, init_std=config.initializer_range, tp=tp
        )


class BertEmbeddings(WordTable):
    """Word, position and type embeddings, summed, with dropout; with post-layer-norm the sum has a norm before it."""

    #: What dropout hashes of the columns, of compiled modules.
    _hashed: Tensor | None = None
    #: Whether positions are added; the documented classes may have a table of distances in attention instead.
    absolute = True

    def __init__(self, config: MegatronBertConfig, *, tp: TensorParallel = SINGLE) -> None:
        super().__init__(config, tp=tp)
        self.tp, self.dropout_prob = tp, config.hidden_dropout_prob
        size, std = config.hidden_size, config.initializer_range
        positions, types = config.max_position_embeddings, config.type_vocab_size
        self.position_embeddings = TokenTable(positions, size, init_std=std, divided=tp.sequence)
        self.token_type_embeddings = TokenTable(types, size, init_std=std, divided=tp.sequence)
        self.norm: LayerNorm | None = None
        if config.layer_norm_placement == "post":
            self.norm = LayerNorm(size, config.layer_norm_eps, divided=tp.sequence)

    def forward(
        self,
        tokens: Tensor | None,
        positions: Tensor,
        types: Tensor,
        dropout_keys: Tensor | None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """Embed tokens.

        Args:
            tokens, positions, types: int64 ``[T]``, the same on every tensor rank.
            dropout_keys: int64 ``[T]`` dropout keys; None without dropout.
            embedded: ``[T, H]``, what stands in place of word embeddings where there are no ``tokens``.

        Returns:
            ``[T, H]``, or this rank's ``[T/t, H]`` under sequence parallelism.
        """
        words = self._words(tokens) if embedded is None else embedded
        places = self.position_embeddings(own_tokens(positions, self.tp)) if self.absolute else None
        return self._sum(words, places, self.token_type_embeddings(own_tokens(types, self.tp)), dropout_keys)

    def compile_forward(self) -> None:
        """Compile the sum and what follows; rows of tables are picked, and their gradients summed, by torch."""
        table = self.token_type_embeddings.weight
        self._sum = torch.compile(self._sum, fullgraph=True)  # type: ignore[method-assign]
        self._hashed = hashed_columns(table.shape[1], table.device)

    def _sum(self, words: Tensor, places: Tensor | None, types: Tensor, dropout_keys: Tensor | None) -> Tensor:
        hidden = (words if places is None else words + places) + types
        hidden = hidden if self.norm is None else self.norm(hidden)
        if dropout_keys is None:
            return hidden
        return keyed_dropout(hidden, self.dropout_prob, own_tokens(dropout_keys, self.tp), hashed=self._hashed)

    def _words(self, tokens: Tensor | None) -> Tensor:
        assert tokens is not None, "either tokens or their embeddings are given"
        return self.word_embeddings(tokens)


class Encoder(nn.Module):
    """Layers ``first`` to ``last`` of the stack, and the final norm when they include the top (pre-layer-norm only).

    Layers keep their global numbers as names, whatever part of the stack this is.

    Args:
        config, tp: as of EncoderStage.
        layers: the range of layers to build; all by default.
        recompute: what layers compute again in the backward pass.
    """

    def __init__(
        self,
        config: MegatronBertConfig,
        *,
        tp: TensorParallel = SINGLE,
        layers: range | None = None,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        plain = config.position_embedding_type == "absolute" and not config.add_cross_attention
        assert plain, "only the documented classes have relative positions and cross-attention"
        layers = range(config.num_hidden_layers) if layers is None else layers
        self.first_layer = layers.start
        self.layers = nn.ModuleDict({str(i): TransformerLayer(config, tp=tp, recompute=recompute) for i in layers})
        self.final_norm: LayerNorm | None = None
        if layers.stop == config.num_hidden_layers and config.layer_norm_placement == "pre":
            self.final_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, divided=tp.sequence)

    def layer_list(self) -> list[TransformerLayer]:
        """The layers of this part of the stack, lowest first."""
        return [layer for layer in self.layers.values() if isinstance(layer, TransformerLayer)]

    def compile_keys(self) -> None:
        """Compile the folding of dropout keys."""
        self._layer_keys = torch.compile(self._layer_keys, fullgraph=True)  # type: ignore[method-assign]

    def selects(self, hidden: Tensor) -> bool:
        """Whether it can compute the last hidden states of some tokens alone, on the top stage."""
        layers = self.layer_list()
        return bool(layers) and layers[-1].selects(hidden)

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        dropout_keys: Tensor | None,
        request: EncoderRequest | None = None,
        rows: Tensor | None = None,
    ) -> Tensor | EncoderOutput:
        """Run the layers.

        Args:
            hidden: ``[T, H]``, or this rank's ``[T/t, H]`` under sequence parallelism.
            layout: which tokens belong together.
            dropout_keys: int64 ``[T]`` dropout keys of all tokens; None without dropout.
            request: what is asked beyond the last hidden states; the sequences then stand in a rectangle, unless only
                hidden states are asked for.
            rows: int64 ``[S]``, the tokens whose last hidden states are asked for, where it :meth:`selects`.

        Returns:
            As ``hidden``, or ``[S, H]`` of the rows; on request with what was asked for.
        """
        if request is not None:
            return self._answer(hidden, layout, dropout_keys, request)
        last = None if rows is None else self.layer_list()[-1]
        for layer, layer_keys in zip(self.layers.values(), self._layer_keys(dropout_keys), strict=True):
            hidden = layer(hidden, layout, layer_keys, rows=rows if layer is last else None)
        return hidden if self.final_norm is None else self.final_norm(hidden)

    def _layer_keys(self, dropout_keys: Tensor | None) -> Sequence[Tensor | None]:
        """Dropout keys of each layer.

        They are folded here, as tensors, so that all layers share one compiled graph, and for all layers at once.
        """
        if dropout_keys is None:
            return [None] * len(self.layers)
        numbers = torch.arange(self.first_layer, self.first_layer + len(self.layers), device=dropout_keys.device)
        return fold_in(dropout_keys, 1 + numbers[:, None]).unbind()

    def _answer(
        self, hidden: Tensor, layout: SequenceLayout, dropout_keys: Tensor | None, request: EncoderRequest
    ) -> EncoderOutput:
        shown: list[Tensor] = []

        def show(hidden: Tensor) -> Tensor:
            if request.shown is not None:
                given, hidden = request.shown(hidden)
                shown.append(given)
            return hidden

        outputs = []
        asked_of = [None] * len(self.layers) if request.layers is None else request.layers
        layers = zip(self.layers.values(), self._layer_keys(dropout_keys), asked_of, strict=True)
        for layer, layer_keys, asked in layers:
            hidden = show(hidden)
            if asked is None:
                hidden = layer(hidden, layout, layer_keys)
            else:
                # A layer that is computed again by torch's reentrant checkpoint gives a plain tuple.
                outputs.append(LayerOutput(*layer(hidden, layout, layer_keys, asked)))
                hidden = outputs[-1].hidden
        return EncoderOutput(
            hidden=show(hidden if self.final_norm is None else self.final_norm(hidden)),
            hidden_states=tuple(shown),
            attentions=tuple(out.attentions for out in outputs if out.attentions is not None),
            cross_attentions=tuple(out.cross_attentions for out in outputs if out.cross_attentions is not None),
        )
