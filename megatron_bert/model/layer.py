# SPDX-License-Identifier: Apache-2.0
"""One transformer layer, with its norms before each part (Shoeybi et al., arXiv 1909.08053, figure 7b) or after.

Pre-layer-norm leaves the residual stream as it is: ``x + part(norm(x))``. Post-layer-norm, that of BERT and RoBERTa,
normalizes each sum: ``norm(x + part(x))``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_bert import backends
from megatron_bert.model.activations import ACTIVATIONS
from megatron_bert.model.attention import SelfAttention
from megatron_bert.model.attention_functions import gpu_has_flash_attention
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.requests import AttentionRequest, LayerOutput
from megatron_bert.model.sequences import SequenceLayout
from parallel.dropout import fold_in, hashed_columns, keyed_dropout
from parallel.layers import ColumnParallelLinear, RowParallelLinear
from parallel.mesh import SINGLE, TensorParallel
from parallel.recompute import Recompute, recomputed
from parallel.sharding import Constant, ParallelModule
from parallel.simulated_device import has_numbers, on_gpu

# What dropout keys are folded with at each place of a layer, so that their masks are independent.
ATTENTION_PROBABILITIES, ATTENTION_OUTPUT, MLP_OUTPUT, CROSS_PROBABILITIES, CROSS_OUTPUT = range(5)


class LayerNorm(ParallelModule):
    """Layer norm over the hidden dimension, replicated over tensor ranks.

    Args:
        size: H.
        eps: added to the variance.
        divided: whether it sees only this rank's tokens (sequence parallelism), so its gradients are partial.
    """

    def __init__(self, size: int, eps: float, *, divided: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.initializers = {"weight": Constant(1.0), "bias": Constant(0.0)}
        if divided:
            self.token_partial = ("weight", "bias")

    def forward(self, x: Tensor) -> Tensor:
        """``[.., H]`` to ``[.., H]``."""
        return backends.layer_norm(x, self.weight, self.bias, self.eps)


class Mlp(nn.Module):
    """H to intermediate size, activation, and back; the intermediate features are divided over tensor ranks."""

    def __init__(
        self, config: MegatronBertConfig, *, tp: TensorParallel = SINGLE, recompute: Recompute = "none"
    ) -> None:
        super().__init__()
        self.recompute, self.hidden_act = recompute, config.hidden_act
        size, wide = config.hidden_size, config.intermediate_size
        self.intermediate = ColumnParallelLinear(size, wide, init_std=config.initializer_range, tp=tp)
        self.output = RowParallelLinear(wide, size, init_std=config.output_init_std, tp=tp)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[T, H]`` (``[T/t, H]`` under sequence parallelism) to the same."""
        wide = self.intermediate(hidden)
        product = recomputed(self._activated_product, self.recompute, wide, at="selective", draws=False)
        return self.output.finish(product)

    def _activated_product(self, wide: Tensor) -> Tensor:
        return self.output.product(ACTIVATIONS[self.hidden_act](wide))


class TransformerLayer(nn.Module):
    """x + dropout(attention(norm(x))), then x + dropout(mlp(norm(x))); with post-layer-norm norm(x + dropout(..(x))).

    A decoder's layer may have cross-attention between the two, with a norm of its own; only the documented classes do.
    """

    _compiled = False
    #: What dropout hashes of the columns, of compiled modules.
    _hashed: Tensor | None = None
    cross_attention: Any = None
    cross_attention_norm: Any = None

    def __init__(
        self, config: MegatronBertConfig, *, tp: TensorParallel = SINGLE, recompute: Recompute = "none"
    ) -> None:
        super().__init__()
        self.tp, self.recompute, self.dropout_prob = tp, recompute, config.hidden_dropout_prob
        self.post_norm = config.layer_norm_placement == "post"
        size, eps = config.hidden_size, config.layer_norm_eps
        self.attention_norm = LayerNorm(size, eps, divided=tp.sequence)
        self.attention = SelfAttention(config, tp=tp, recompute=recompute)
        self.mlp_norm = LayerNorm(size, eps, divided=tp.sequence)
        self.mlp = Mlp(config, tp=tp, recompute=recompute)

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        dropout_keys: Tensor | None,
        request: AttentionRequest | None = None,
        rows: Tensor | None = None,
    ) -> Tensor | LayerOutput:
        """One layer; arguments and result as of Encoder, with dropout keys of this layer."""
        if request is None and rows is None:
            return self._run(hidden, layout, dropout_keys)
        args = hidden, layout, dropout_keys, request, rows
        return recomputed(self._forward, self.recompute, *args, draws=self.draws)

    @property
    def draws(self) -> bool:
        """Whether it may draw from torch's generator, as the dropout of fused attention does."""
        return self.attention.dropout_prob > 0.0

    def selects(self, hidden: Tensor) -> bool:
        """Whether it can compute some tokens alone, for which attention reads all: on a processor, as it is.

        On a GPU, layers are compiled for one number of tokens; what tensor ranks send each other, and what steps are
        simulated with, is counted for all tokens.
        """
        plain = self.tp.size == 1 and not self._compiled
        return plain and hidden.device.type == "cpu" and not on_gpu(hidden) and has_numbers(hidden)

    def compile_forward(self) -> None:
        """Compile the layer's computation, which leaves hooks of data parallelism outside the compiled graph."""
        torch.compiler.assume_constant_result(gpu_has_flash_attention)
        self._run = torch.compile(self._run, fullgraph=True)  # type: ignore[method-assign]
        self._compiled = True
        self._hashed = hashed_columns(self.mlp_norm.weight.shape[0], self.mlp_norm.weight.device)

    def _run(self, hidden: Tensor, layout: SequenceLayout, dropout_keys: Tensor | None) -> Tensor:
        return recomputed(self._forward, self.recompute, hidden, layout, dropout_keys, draws=self.draws)

    def _forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        dropout_keys: Tensor | None,
        request: AttentionRequest | None = None,
        rows: Tensor | None = None,
    ) -> Tensor | LayerOutput:
        read = self._read(self.attention_norm, hidden)
        attended = self.attention(read, layout, _fold(dropout_keys, ATTENTION_PROBABILITIES), request, rows)
        part, probabilities = (attended, None) if request is None else attended
        if rows is not None:
            hidden = hidden.index_select(0, rows)
            dropout_keys = None if dropout_keys is None else dropout_keys.index_select(0, rows)
        hidden = self._add(self.attention_norm, hidden, part, dropout_keys, ATTENTION_OUTPUT)
        del read, attended, part  # their memory is free for what the MLP makes
        if request is None:
            return self._mlp(hidden, dropout_keys)
        crossed = None
        if request.encoder is not None:
            cross_keys, norm = _fold(dropout_keys, CROSS_PROBABILITIES), self.cross_attention_norm
            part, crossed = self.cross_attention(self._read(norm, hidden), layout, cross_keys, request)
            hidden = self._add(norm, hidden, part, dropout_keys, CROSS_OUTPUT)
        return LayerOutput(self._mlp(hidden, dropout_keys), probabilities, crossed)

    def _mlp(self, hidden: Tensor, dropout_keys: Tensor | None) -> Tensor:
        part = self.mlp(self._read(self.mlp_norm, hidden))
        return self._add(self.mlp_norm, hidden, part, dropout_keys, MLP_OUTPUT)

    def _read(self, norm: LayerNorm, hidden: Tensor) -> Tensor:
        """What a part of the layer reads of the residual stream."""
        return hidden if self.post_norm else norm(hidden)

    def _add(
        self,
        norm: LayerNorm,
        hidden: Tensor,
        part: Tensor,
        dropout_keys: Tensor | None = None,
        place: int = MLP_OUTPUT,
    ) -> Tensor:
        """The residual stream with what dropout leaves of a part."""
        if dropout_keys is None:
            added = hidden + part
        else:
            added = keyed_dropout(
                part,
                self.dropout_at(place),
                fold_in(own_tokens(dropout_keys, self.tp), place),
                keep_nothing=self.recompute == "full",
                hashed=self._hashed,
                residual=hidden,
            )
        return norm(added) if self.post_norm else added

    def dropout_at(self, place: int) -> float:
        """Probability of dropout at a place of the layer."""
        del place
        return self.dropout_prob


def _fold(dropout_keys: Tensor | None, place: int) -> Tensor | None:
    return None if dropout_keys is None else fold_in(dropout_keys, place)


def own_tokens(per_token: Tensor, tp: TensorParallel) -> Tensor:
    """The rows of ``[T, ..]`` that belong to this rank's tokens; all of them without sequence parallelism."""
    if not tp.sequence:
        return per_token
    share = per_token.shape[0] // tp.size
    return per_token.narrow(0, tp.rank * share, share)
