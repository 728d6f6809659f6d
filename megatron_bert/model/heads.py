# SPDX-License-Identifier: Apache-2.0
"""Heads: masked language modelling at chosen positions, sentence pairs, and those of tasks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_bert.model.activations import ACTIVATIONS
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.layer import LayerNorm
from parallel.dropout import fold_in, keyed_dropout
from parallel.layers import column_parallel_linear
from parallel.mesh import SINGLE, TensorParallel
from parallel.sharding import Constant, Normal, ParallelModule, sharded_parameter
from parallel.weight_gradients import linear

# What dropout keys are folded with before the second layer of a sequence head, so that its mask is another.
_SECOND = 1


class Dense(ParallelModule):
    """A linear layer that every tensor rank repeats: it sees few rows (a pooled token, masked positions)."""

    def __init__(self, in_features: int, out_features: int, *, init_std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.initializers = {"weight": Normal(init_std), "bias": Constant(0.0)}

    def forward(self, x: Tensor) -> Tensor:
        """``[N, K]`` to ``[N, out_features]``."""
        return linear(x, self.weight, self.bias)


class Pooler(Dense):
    """Dense and tanh, on the first token of a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        """``[N, K]`` to ``[N, out_features]``."""
        return torch.tanh(super().forward(x))


def dropped(features: Tensor, dropout_keys: Tensor | None, config: MegatronBertConfig) -> Tensor:
    """Dropout before the head of a task: ``[N, H]`` with a key per row; none without keys."""
    if dropout_keys is None:
        return features
    return keyed_dropout(features, config.classifier_dropout_prob, dropout_keys)


class SequenceHead(nn.Module):
    """RoBERTa's head on the first token of a sequence: dense, tanh and dense, with dropout before both."""

    def __init__(self, config: MegatronBertConfig, outputs: int) -> None:
        super().__init__()
        self.config = config
        size, std = config.hidden_size, config.initializer_range
        self.dense = Pooler(size, size, init_std=std)
        self.out_proj = Dense(size, outputs, init_std=std)

    def forward(self, first_tokens: Tensor, dropout_keys: Tensor | None) -> Tensor:
        """``[N, H]``, with a dropout key per row or None, to ``[N, outputs]``."""
        inner = self._inner(self._drop(first_tokens, dropout_keys))
        return self.out_proj(self._drop(inner, None if dropout_keys is None else fold_in(dropout_keys, _SECOND)))

    def _drop(self, features: Tensor, dropout_keys: Tensor | None) -> Tensor:
        return dropped(features, dropout_keys, self.config)

    def _inner(self, first_tokens: Tensor) -> Tensor:
        """Dense and tanh."""
        return self.dense(first_tokens)


class MaskedLanguageHead(ParallelModule):
    """Dense, activation, norm, then the word embeddings as output matrix with a bias of its own."""

    def __init__(self, config: MegatronBertConfig, *, tp: TensorParallel = SINGLE) -> None:
        super().__init__()
        self.tp, self.hidden_act = tp, config.hidden_act
        size = config.hidden_size
        self.dense = Dense(size, size, init_std=config.initializer_range)
        self.norm = LayerNorm(size, config.layer_norm_eps)
        self.bias = sharded_parameter((config.padded_vocab_size,), tp, dim=0)
        self.initializers["bias"] = Constant(0.0)

    def forward(self, selected: Tensor, word_embeddings: Tensor) -> Tensor:
        """Logits over this rank's part of the vocabulary.

        Args:
            selected: ``[K, H]`` final hidden states of the positions to predict, replicated over tensor ranks.
            word_embeddings: the embedding table's weight.

        Returns:
            ``[K, padded_vocab/t]``.
        """
        return self._logits(selected, word_embeddings)

    def compile_forward(self) -> None:
        """Compile the computation, which leaves hooks of data parallelism outside the compiled graph."""
        self._logits = torch.compile(self._logits, fullgraph=True)  # type: ignore[method-assign]

    def _logits(self, selected: Tensor, word_embeddings: Tensor) -> Tensor:
        features = self.norm(ACTIVATIONS[self.hidden_act](self.dense(selected)))
        return column_parallel_linear(features, word_embeddings, self.bias, self.tp, sequence=False)


class SentencePairHead(nn.Module):
    """Pooler (dense and tanh on the first token) and a classifier of two: in order or swapped, or next or random."""

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__()
        std = config.initializer_range
        self.pooler = Pooler(config.hidden_size, config.hidden_size, init_std=std)
        self.classifier = Dense(config.hidden_size, 2, init_std=std)

    def forward(self, first_tokens: Tensor) -> Tensor:
        """Final hidden states of the first tokens ``[B, H]`` to logits ``[B, 2]``."""
        return self.classifier(self.pooler(first_tokens))
