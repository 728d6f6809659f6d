# SPDX-License-Identifier: Apache-2.0
"""Plans of random integers, whose activations have about the ranges of real ones, and inputs for them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_bert.ibert.engine.plan import (
    Attention,
    Dense,
    Embeddings,
    Gelu,
    Heads,
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

WORDS = 100


class _Random:
    """Parts of a plan.

    Args:
        seed: of all numbers.
        bits: of weights.
        left: whether some rescaling shifts go to the left.
        loud: whether activations and weights are mostly at their bounds.
    """

    def __init__(self, seed: int, bits: int, left: bool, loud: bool) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.largest, self.left, self.loud = 2 ** (bits - 1) - 1, left, loud

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def matrix(self, rows: int, columns: int) -> Matrix:
        weight = self.integers(-self.largest, self.largest, rows, columns).to(torch.int8)
        weight = weight.sign() * self.largest if self.loud else weight
        return Matrix(weight, self.integers(-(2**14), 2**14, rows).to(torch.int32))

    def rescale(self, rows: int, columns: int, deviation: float, guard: int, of_input: float = 40.0) -> Rescale:
        """To results of a standard deviation of about ``deviation``."""
        factor = deviation / (self.largest * 0.58 * of_input * math.sqrt(columns))
        shift = max(-math.frexp(factor)[1] - guard, 0)
        multiplier = min(32767, int(factor * 2 ** (15 + shift) + 0.5))
        shifts = torch.full((rows,), shift)
        if self.left:
            shifts = (shifts + self.integers(-12, 3, rows)).clamp(-15, 30)
        multipliers = multiplier + self.integers(-multiplier // 8, 0, rows)
        return Rescale(shifts.to(torch.int8), multipliers.to(torch.int16))

    def norm(self, columns: int, limit: int, read: int = 0) -> Norm:
        gain = self.integers(-12000, 12000, columns).to(torch.int16)
        shift, offset = (17, 2**24) if limit < 128 else (10, 2**18)
        offsets = self.integers(-offset, offset, columns).to(torch.int32)
        return Norm(read, 32767, gain, offsets, shift - 4 * self.loud, 1000, limit)

    def wide(self, rows: int) -> Wide:
        return Wide(self.integers(20, 30, rows).to(torch.int8), self.integers(2**22, 2**23, rows).to(torch.int32))


def random_plan(
    hidden: int = 64,
    intermediate: int = 256,
    heads: int = 4,
    layers: int = 2,
    *,
    words: int = WORDS,
    positions: int = 64,
    post: bool = False,
    bits: int = 8,
    attention_limit: int = 127,
    left: bool = False,
    loud: bool = False,
    seed: int = 0,
) -> Plan:
    """A plan with all heads.

    Args:
        hidden, intermediate, heads, layers, words, positions: sizes.
        post: post-layer-norm.
        bits: of weights.
        attention_limit: of queries, keys and values.
        left: some rescaling shifts go to the left.
        loud: activations and weights are mostly at their bounds.
        seed: of all numbers.
    """
    r = _Random(seed, bits, left, loud)
    read8 = Read8(5, 4000, 127)

    def layer(number: int) -> Layer:
        to_norm = 32767 if post else 127
        return Layer(
            read_attention=read8 if post else None,
            attention_norm=r.norm(hidden, to_norm, 0 if post else number % 3 - 1),
            query_key_value=r.matrix(3 * hidden, hidden),
            query_key_value_rescale=r.rescale(3 * hidden, hidden, 30, 4),
            attention=Attention(heads, attention_limit, 3 - 5 * (seed % 2), 40000, 20000, -1, 127),
            attention_output=r.matrix(hidden, hidden),
            attention_output_rescale=r.rescale(hidden, hidden, 1500, 0),
            attention_read=number % 2,
            attention_limit=32767,
            read_mlp=read8 if post else None,
            mlp_norm=r.norm(hidden, to_norm),
            intermediate=r.matrix(intermediate, hidden),
            intermediate_rescale=r.rescale(intermediate, hidden, 1500, 0),
            gelu=Gelu(9, 32000 if loud else 8000, 20, 255),
            output=r.matrix(hidden, intermediate),
            output_rescale=r.rescale(hidden, intermediate, 1500, 0, 60.0),
            output_read=-(number % 2),
            output_limit=32767,
        )

    tables = Embeddings(
        word=r.integers(-127, 127, words, hidden).to(torch.int8),
        word_rescale=Rescale(
            torch.full((words,), -5, dtype=torch.int8), r.integers(9000, 20000, words).to(torch.int16)
        ),
        position=r.integers(-2000, 2000, positions, hidden).to(torch.int16),
        token_type=r.integers(-500, 500, 2, hidden).to(torch.int16),
        first_position=0,
        limit=32767,
        norm=r.norm(hidden, 32767) if post else None,
    )
    all_heads = Heads(
        pooler=Pooler(read8, r.matrix(hidden, hidden), r.rescale(hidden, hidden, 1500, 0)),
        classifier=Dense(read8, r.matrix(3, hidden), r.wide(3)),
        pair=Dense(read8, r.matrix(2, hidden), r.wide(2)),
        masked=MaskedLanguage(
            read=read8,
            dense=r.matrix(hidden, hidden),
            rescale=r.rescale(hidden, hidden, 1500, 0),
            exponent=9,
            gelu_read=-1,
            gelu_limit=32767,
            norm=r.norm(hidden, 127),
            decoder=None if bits == 8 else r.integers(-63, 63, words, hidden).to(torch.int8),
            bias=r.integers(-(2**14), 2**14, words).to(torch.int32),
            wide=r.wide(words),
        ),
    )
    return Plan(
        config={},
        settings={},
        task="pretraining",
        hidden_exponent=8,
        embeddings=tables,
        layers=tuple(layer(number) for number in range(layers)),
        final_norm=None if post else r.norm(hidden, 32767),
        heads=all_heads,
    )


#: Tokens, positions, types and starts of sequences end to end.
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def sequences(lengths: list[int], seed: int = 1) -> Inputs:
    """Random sequences of these lengths."""
    generator, total = torch.Generator().manual_seed(seed), sum(lengths)
    tokens = torch.randint(0, WORDS, (total,), generator=generator).int()
    types = torch.randint(0, 2, (total,), generator=generator).int()
    positions = torch.cat([torch.arange(length) for length in lengths]).int()
    return tokens, positions, types, torch.tensor([0, *lengths]).cumsum(0).int()


#: Makes inputs that a plan of one layer does not take -> what engines say of them.
BAD_INPUTS: list[tuple[Callable[[Inputs], Inputs], str]] = [
    (lambda i: (i[0] * 0 + WORDS, *i[1:]), "token 100 is outside of 0 to 99"),
    (lambda i: (i[0], i[1] + 60, *i[2:]), "position 64 is outside of 0 to 63"),
    (lambda i: (*i[:2], i[2] - 2, i[3]), "type -.* is outside of 0 to 1"),
    (lambda i: sequences([65]), "sequence 0 has 65 tokens, but the model takes at most 64"),
    (lambda i: (*i[:3], torch.tensor([0, 9, 8])), "sequence 1 ends before it begins"),
    (lambda i: (*i[:3], torch.tensor([0, 9])), "sequences end at token 9, but 8 tokens are given"),
]
