# SPDX-License-Identifier: Apache-2.0
"""The reference backend: the specification in torch's integers, on any machine.

No tensor here is in floating point. It is what faster backends are compared with, and what runs without a compiler.
"""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor

from megatron_bert.ibert import gelu as integer_gelu
from megatron_bert.ibert import layer_norm as integer_norm
from megatron_bert.ibert import tanh as integer_tanh
from megatron_bert.ibert.engine.backend import HeadName
from megatron_bert.ibert.engine.plan import (
    Attention,
    Dense,
    Embeddings,
    Gelu,
    Layer,
    MaskedLanguage,
    Matrix,
    Norm,
    Plan,
    Pooler,
    Read8,
    Rescale,
    Wide,
)
from megatron_bert.ibert.fixed_point import (
    LARGEST_SHORT,
    Dyadic,
    Factor,
    multiply_short,
    requantize,
    rounding_shift,
    short,
    wide_requantize,
)
from megatron_bert.ibert.softmax import MeanFactor, ScoreFactor, row_factor, softmax_numerators

#: Bounds of logits, and of tanh's argument.
_LOGITS = 2**24 - 1


class ReferenceBackend:
    """Torch's integers."""

    name = "reference"
    prepare_file = None

    def prepare(self, plan: Plan, threads: int | None = None) -> ReferenceExecutable:  # noqa: ARG002
        """Nothing is to be done; torch's own setting of threads counts."""
        return ReferenceExecutable(plan)


class ReferenceExecutable:
    """A plan, run as it stands.

    Args:
        plan: to run.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def encode(self, tokens: Tensor, positions: Tensor, types: Tensor, starts: Tensor) -> Tensor:
        """See :class:`~megatron_bert.ibert.engine.backend.Executable`."""
        stream = embed(self.plan.embeddings, tokens, positions, types)
        for layer in self.plan.layers:
            stream = run_layer(layer, stream, starts)
        if self.plan.final_norm is not None:
            stream = normalize(self.plan.final_norm, stream)
        return stream.to(torch.int16)

    def head(self, name: HeadName, rows: Tensor) -> Tensor:
        """See :class:`~megatron_bert.ibert.engine.backend.Executable`."""
        heads = self.plan.heads
        if name == "pooler" and heads.pooler is not None:
            return pool(heads.pooler, rows)
        if name == "masked" and heads.masked is not None:
            return predict_words(heads.masked, self.plan.embeddings.word, rows)
        head = {"classifier": heads.classifier, "pair": heads.pair}.get(name)
        assert head is not None, f"the plan has no head {name}"
        return classify(head, rows)


# ---------------------------------------------------------------- primitives


@cache
def _exact_short_products() -> bool:
    """Whether torch's product of 8-bit matrices is exact: it saturates sums of two products on some processors."""
    most = torch.full((2, 64), 127, dtype=torch.int8)
    signs = torch.cat((most[:1], -most[:1]))
    try:
        return torch._int_mm(signs, signs.t()).tolist() == [[64 * 127**2, -64 * 127**2], [-64 * 127**2, 64 * 127**2]]
    except RuntimeError:
        return False


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` of int8 ``[T, K]`` and ``[N, K]``: int32 ``[T, N]``, exact."""
    if _exact_short_products() and x.shape[1] > 1:  # torch's leaves memory as it was where there is one column
        return torch._int_mm(x, weight.t())
    return x.int() @ weight.t().int()


def accumulate(x: Tensor, matrix: Matrix) -> Tensor:
    """A linear layer's accumulators, int32."""
    return product(x, matrix.weight) + matrix.bias


def rescaled(a: Tensor, rescale: Rescale, limit: int = LARGEST_SHORT) -> Tensor:
    """Accumulators requantized row by row and clamped, int64."""
    return requantize(a, Factor(rescale.multiplier.long(), rescale.shift.long()), -limit, limit)


def widened(a: Tensor, wide: Wide) -> Tensor:
    """Accumulators to logits, int32."""
    return wide_requantize(a, Dyadic(wide.multiplier.long(), wide.shift.long()), -_LOGITS, _LOGITS).int()


def read8(stream: Tensor, read: Read8) -> Tensor:
    """The stream in 8 bits."""
    narrow = short(rounding_shift(stream.long(), read.shift))
    return multiply_short(narrow, read.multiplier).clamp(-read.limit, read.limit).to(torch.int8)


def read16(stream: Tensor, shift: int) -> Tensor:
    """The stream at another power of two, int64."""
    return rounding_shift(stream.long(), shift).clamp(-LARGEST_SHORT, LARGEST_SHORT)


def normalize(norm: Norm, stream: Tensor) -> Tensor:
    """Layer norm, int64."""
    x = read16(stream, norm.read).clamp(-norm.read_limit, norm.read_limit)
    total, squares = integer_norm.moments(x)
    columns = x.shape[-1]
    deviations = integer_norm.deviation(total, squares, columns, torch.full_like(total, norm.epsilon))
    normal = integer_norm.normalized(x, total, integer_norm.row_factor(deviations, columns), columns)
    return ((normal * norm.gain.long() + norm.offset.long()) >> norm.shift).clamp(-norm.limit, norm.limit)


# ---------------------------------------------------------------- the encoder


def embed(embeddings: Embeddings, tokens: Tensor, positions: Tensor, types: Tensor) -> Tensor:
    """The stream that the first layer reads, ``[T, H]``."""
    rescale = embeddings.word_rescale
    number = Factor(rescale.multiplier[tokens].long()[:, None], rescale.shift[tokens].long()[:, None])
    words = requantize(embeddings.word[tokens], number, -embeddings.limit, embeddings.limit)
    summed = words + embeddings.position[positions] + embeddings.token_type[types]
    summed = summed.clamp(-embeddings.limit, embeddings.limit)
    return summed if embeddings.norm is None else normalize(embeddings.norm, summed)


def run_layer(layer: Layer, stream: Tensor, starts: Tensor) -> Tensor:
    """One layer, ``[T, H]`` to the same."""

    def add(part: Tensor, rescale: Rescale, shift: int, limit: int, norm: Norm) -> Tensor:
        total = (read16(stream, shift) + rescaled(part, rescale)).clamp(-limit, limit)
        return normalize(norm, total) if layer.post_norm else total

    def read(how: Read8 | None, norm: Norm) -> Tensor:
        return normalize(norm, stream).to(torch.int8) if how is None else read8(stream, how)

    x = read(layer.read_attention, layer.attention_norm)
    qkv = rescaled(accumulate(x, layer.query_key_value), layer.query_key_value_rescale, layer.attention.limit)
    context = attend(layer.attention, qkv, starts)
    part = accumulate(context, layer.attention_output)
    norm, rescale = layer.attention_norm, layer.attention_output_rescale
    stream = add(part, rescale, layer.attention_read, layer.attention_limit, norm)
    x = read(layer.read_mlp, layer.mlp_norm)
    wide = rescaled(accumulate(x, layer.intermediate), layer.intermediate_rescale)
    part = accumulate_unsigned(activate(layer.gelu, wide), layer.gelu.zero_point, layer.output)
    return add(part, layer.output_rescale, layer.output_read, layer.output_limit, layer.mlp_norm)


def activate(gelu: Gelu, wide: Tensor) -> Tensor:
    """GELU of 16-bit arguments, stored without sign: uint8."""
    q = multiply_short(integer_gelu.gelu(wide, gelu.exponent), gelu.multiplier)
    return (q + gelu.zero_point).clamp(0, gelu.top).to(torch.uint8)


def accumulate_unsigned(x: Tensor, zero_point: int, matrix: Matrix) -> Tensor:
    """Accumulators of uint8 ``[T, K]`` whose true values are less by the zero point."""
    sums = matrix.weight.sum(1, dtype=torch.int32)
    return product((x.int() - 128).to(torch.int8), matrix.weight) + (matrix.bias + (128 - zero_point) * sums)


def attend(attention: Attention, qkv: Tensor, starts: Tensor) -> Tensor:
    """Attention within each sequence: int64 ``[T, 3H]`` to int8 ``[T, H]``."""
    scores = ScoreFactor(attention.score_multiplier, attention.score_shift)
    mean = MeanFactor(attention.mean_multiplier, attention.mean_exponent)
    limit, ends = attention.context_limit, starts.tolist()
    out = []
    for first, last in itertools.pairwise(ends):
        # [heads, S, D] each; products of integers in 32 bits.
        query, key, value = qkv[first:last].int().unflatten(1, (3, attention.heads, -1)).permute(1, 2, 0, 3).unbind(0)
        numerators = softmax_numerators(torch.bmm(query, key.transpose(1, 2)).long(), scores, None)
        factor = row_factor(numerators.sum(-1, keepdim=True), mean)
        context = requantize(torch.bmm(numerators.int(), value), factor, -limit, limit)
        out.append(context.transpose(0, 1).flatten(1).to(torch.int8))
    return torch.cat(out)


# ---------------------------------------------------------------- heads


def pool(pooler: Pooler, rows: Tensor) -> Tensor:
    """int16 ``[R, H]`` of scale 2^-15."""
    bound = integer_tanh.LARGEST_ARGUMENT
    return integer_tanh.tanh(
        rescaled(accumulate(read8(rows, pooler.read), pooler.matrix), pooler.rescale, bound)
    ).short()


def classify(head: Dense, rows: Tensor) -> Tensor:
    """Logits, int32 ``[R, outputs]``."""
    return widened(accumulate(read8(rows, head.read), head.matrix), head.wide)


def predict_words(head: MaskedLanguage, words: Tensor, rows: Tensor) -> Tensor:
    """Logits, int32 ``[R, V]``."""
    wide = rescaled(accumulate(read8(rows, head.read), head.dense), head.rescale)
    stream = read16(integer_gelu.gelu(wide, head.exponent), head.gelu_read).clamp(-head.gelu_limit, head.gelu_limit)
    features = normalize(head.norm, stream).to(torch.int8)
    return widened(product(features, words if head.decoder is None else head.decoder) + head.bias, head.wide)
