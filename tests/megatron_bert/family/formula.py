# SPDX-License-Identifier: Apache-2.0
"""The model written out in float64, from weights under transformers' names: the reference for what it lacks.

Every option is its plainest formula: relative positions are gathered for each pair of query and key, head masks
multiply probabilities, cross-attention has keys of its own number.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bert.model.resharding import undivided


def weights_of(model: Any) -> dict[str, Tensor]:
    """Parameters in float64 by transformers' names, to take gradients of."""
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        whole = undivided(parameter).double()
        weights[name] = whole[: model.config.vocab_size] if model.has_words(name) else whole
    return {key.removeprefix("bert."): tensor.clone().requires_grad_() for key, tensor in weights.items()}


class Formula:
    """Hidden states and probabilities of a model.

    Args:
        config: of the model.
        weights: see :func:`weights_of`.
    """

    def __init__(self, config: Any, weights: dict[str, Tensor]) -> None:
        self.config, self.weights = config, weights
        self.attentions: list[Tensor] = []
        self.cross_attentions: list[Tensor] = []

    def __call__(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder: Tensor | None = None,
        encoder_mask: Tensor | None = None,
    ) -> Tensor:
        """``[B, S, H]``; masks are bool ``[B, 1 or Q, K]``, the head mask ``[layers, heads]``."""
        w, length = self.weights, tokens.shape[1]
        x = w["embeddings.word_embeddings.weight"][tokens] + w["embeddings.token_type_embeddings.weight"][0]
        if self.config.position_embedding_type == "absolute":
            x = x + w["embeddings.position_embeddings.weight"][:length]
        if self.config.is_decoder:
            causal = torch.ones(length, length).tril().bool()[None]
            mask = causal if mask is None else causal & mask
        for layer in range(self.config.num_hidden_layers):
            at = f"encoder.layer.{layer}."
            heads = None if head_mask is None else head_mask[layer]
            normed = self._norm(x, at + "attention.ln")
            x = x + self._attend(normed, normed, at + "attention.", mask, heads, self.attentions)
            if encoder is not None:
                normed = self._norm(x, at + "crossattention.ln")
                x = x + self._attend(
                    normed, encoder, at + "crossattention.", encoder_mask, heads, self.cross_attentions
                )
            inner = F.gelu(self._linear(self._norm(x, at + "ln"), at + "intermediate.dense"))
            x = x + self._linear(inner, at + "output.dense")
        return self._norm(x, "encoder.ln")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[name + ".weight"].t() + self.weights[name + ".bias"]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + self.config.layer_norm_eps).sqrt()
        return scaled * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def _attend(
        self, x: Tensor, y: Tensor, at: str, mask: Tensor | None, heads: Tensor | None, kept: list[Tensor]
    ) -> Tensor:
        size = self.config.hidden_size // self.config.num_attention_heads
        q, k, v = (
            self._linear(states, f"{at}self.{name}").unflatten(-1, (-1, size))
            for name, states in (("query", x), ("key", y), ("value", y))
        )
        scores = torch.einsum("bqad,bkad->baqk", q, k)
        kind = self.config.position_embedding_type
        if kind != "absolute":
            distance = torch.arange(x.shape[1])[:, None] - torch.arange(y.shape[1])
            rows = self.weights[at + "self.distance_embedding.weight"][
                distance + self.config.max_position_embeddings - 1
            ]
            scores = scores + torch.einsum("bqad,qkd->baqk", q, rows)
            if kind == "relative_key_query":
                scores = scores + torch.einsum("bkad,qkd->baqk", k, rows)
        scores = scores / math.sqrt(size)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -math.inf)
        probabilities = scores.softmax(-1)
        if heads is not None:
            probabilities = probabilities * heads[:, None, None]
        kept.append(probabilities)
        context = torch.einsum("baqk,bkad->bqad", probabilities, v).flatten(-2)
        return self._linear(context, at + "output.dense")
