# SPDX-License-Identifier: Apache-2.0
"""A plan: everything an engine needs of a quantized model, in integers.

Shapes: V words, P positions, Y token types, H hidden size, I intermediate size, N rows and K columns of a matrix. What
the numbers mean is said in ``specification.md``; tensors are contiguous and on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import NamedTuple

from torch import Tensor

from megatron_bert.model.task_heads.table import HEADS
from parallel.errors import brief


@dataclass(frozen=True)
class Matrix:
    """A linear layer: accumulators are the product with the weight plus the bias.

    Attributes:
        weight: int8 ``[N, K]``, -127 to 127.
        bias: int32 ``[N]``, below 2^27.
    """

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Rescale:
    """A requantization per row of a matrix: shift with rounding, saturate to 16 bits, multiply with rounding.

    Attributes:
        shift: int8 ``[N]``, -15 to 30; below 0 to the left.
        multiplier: int16 ``[N]``, 0 to 32767.
    """

    shift: Tensor
    multiplier: Tensor


@dataclass(frozen=True)
class Wide:
    """A requantization per row in 64 bits, for logits.

    Attributes:
        shift: int8 ``[N]``, 1 to 52.
        multiplier: int32 ``[N]``, at most 2^23.
    """

    shift: Tensor
    multiplier: Tensor


@dataclass(frozen=True)
class Read8:
    """From the stream's 16 bits to 8: one requantization for all elements, then a clamp.

    Attributes:
        shift: -60 to 60, to the left below 0.
        multiplier: 0 to 32767.
        limit: 127 or 63.
    """

    shift: int
    multiplier: int
    limit: int


@dataclass(frozen=True)
class Norm:
    """A layer norm.

    Attributes:
        read: rounding shift of the stream before it, to the left below 0.
        read_limit: bound of what is read.
        gain: int16 ``[H]``.
        offset: int32 ``[H]``, half a unit of the last shift included.
        shift: the last, 1 to 24.
        epsilon: added to N^2 times the variance.
        limit: bound of the result.
    """

    read: int
    read_limit: int
    gain: Tensor
    offset: Tensor
    shift: int
    epsilon: int
    limit: int


@dataclass(frozen=True)
class Embeddings:
    """The tables, and with post-layer-norm the norm of the sum.

    Attributes:
        word: int8 ``[V, H]``.
        word_rescale: a row's.
        position: int16 ``[P, H]``.
        token_type: int16 ``[Y, H]``.
        first_position: of a sequence's first token.
        limit: bound of words and of the sum.
        norm: None with pre-layer-norm.
    """

    word: Tensor
    word_rescale: Rescale
    position: Tensor
    token_type: Tensor
    first_position: int
    limit: int
    norm: Norm | None


@dataclass(frozen=True)
class Attention:
    """What stands between the fused matrix and the output matrix.

    Attributes:
        heads: of this layer.
        limit: bound of queries, keys and values.
        score_shift, score_multiplier: from the distance of a score to the argument of 2^-t.
        mean_multiplier, mean_exponent: from sums divided by a row's sum to the context.
        context_limit: bound of the context.
    """

    heads: int
    limit: int
    score_shift: int
    score_multiplier: int
    mean_multiplier: int
    mean_exponent: int
    context_limit: int


@dataclass(frozen=True)
class Gelu:
    """What stands between the two matrices of the feed-forward part.

    Attributes:
        exponent: fraction bits of the argument, 1 to 13.
        multiplier: from there to the result, a short product.
        zero_point: added to the result when it is stored without sign.
        top: the largest stored value, 255 or 127.
    """

    exponent: int
    multiplier: int
    zero_point: int
    top: int


@dataclass(frozen=True)
class Layer:
    """A transformer layer.

    Attributes:
        read_attention, read_mlp: what the parts read of the stream with post-layer-norm; None with pre-layer-norm.
        attention_norm, mlp_norm: before the parts (to 8 bits), or with post-layer-norm after the sums (to 16).
        query_key_value: ``[3H, H]``: all queries head by head, all keys, all values; ``query_key_value_rescale``.
        attention: see :class:`Attention`.
        attention_output: ``[H, H]``; ``attention_output_rescale`` to the residual sum.
        attention_read: rounding shift of the stream in the residual sum.
        attention_limit: bound of the sum.
        intermediate: ``[I, H]``; ``intermediate_rescale`` to GELU's argument.
        gelu: see :class:`Gelu`.
        output: ``[H, I]``; ``output_rescale`` to the residual sum.
        output_read, output_limit: as those of attention.
    """

    read_attention: Read8 | None
    attention_norm: Norm
    query_key_value: Matrix
    query_key_value_rescale: Rescale
    attention: Attention
    attention_output: Matrix
    attention_output_rescale: Rescale
    attention_read: int
    attention_limit: int
    read_mlp: Read8 | None
    mlp_norm: Norm
    intermediate: Matrix
    intermediate_rescale: Rescale
    gelu: Gelu
    output: Matrix
    output_rescale: Rescale
    output_read: int
    output_limit: int

    @property
    def post_norm(self) -> bool:
        """Whether norms follow the sums."""
        return self.read_attention is not None


@dataclass(frozen=True)
class Pooler:
    """Dense and tanh: from the stream to 16 bits of scale 2^-15."""

    read: Read8
    matrix: Matrix
    rescale: Rescale


@dataclass(frozen=True)
class Dense:
    """A dense layer: from the stream, or a pooler's result, to logits of scale 2^-12."""

    read: Read8
    matrix: Matrix
    wide: Wide


@dataclass(frozen=True)
class MaskedLanguage:
    """The masked-language head.

    Attributes:
        read, dense, rescale: to GELU's argument.
        exponent: fraction bits of the argument.
        gelu_read: rounding shift of GELU's result to the stream's scale.
        norm: to 8 bits.
        decoder: int8 ``[V, H]``; None where it is the table of words.
        bias: int32 ``[V]``.
        wide: to logits.
    """

    read: Read8
    dense: Matrix
    rescale: Rescale
    exponent: int
    gelu_read: int
    gelu_limit: int
    norm: Norm
    decoder: Tensor | None
    bias: Tensor
    wide: Wide


@dataclass(frozen=True)
class Heads:
    """What is there of heads.

    Attributes:
        pooler: on first tokens.
        classifier: on the pooler's result if there is a pooler and the task is about sequences, else on tokens.
        pair: next sentence or not, on the pooler's result.
        masked: words of tokens.
    """

    pooler: Pooler | None = None
    classifier: Dense | None = None
    pair: Dense | None = None
    masked: MaskedLanguage | None = None

    @property
    def present(self) -> tuple[str, ...]:
        """Names of those that are there."""
        return tuple(each.name for each in fields(self) if getattr(self, each.name) is not None)


class PlanHeads(NamedTuple):
    """Which heads a plan has by what its model answers.

    Attributes:
        needed: names in :class:`Heads`.
        more: that may be there too.
        by_sequence: whether a result is made of first tokens.
    """

    needed: frozenset[str]
    more: frozenset[str] = frozenset()
    by_sequence: bool = False


#: Of models that are for no task.
PRETRAINING_HEADS = {
    "encoder": PlanHeads(frozenset(), frozenset({"pooler"})),
    "masked": PlanHeads(frozenset({"masked"})),
    "pretraining": PlanHeads(frozenset({"masked"}), frozenset({"pooler", "pair"}), by_sequence=True),
    "pair": PlanHeads(frozenset({"pooler", "pair"}), by_sequence=True),
}


def plan_heads(task: str) -> PlanHeads:
    """What a model has that answers something.

    Raises:
        ValueError: nothing is known by that name.
    """
    if task in PRETRAINING_HEADS:
        return PRETRAINING_HEADS[task]
    if task not in HEADS:
        raise ValueError(f"task is {brief(task)}: expected one of {', '.join([*PRETRAINING_HEADS, *HEADS])}")
    kind = HEADS[task]
    return PlanHeads(frozenset({"classifier", *(["pooler"] if kind.pooled else [])}), by_sequence=kind.by_sequence)


@dataclass(frozen=True)
class Plan:
    """A model.

    Attributes:
        config: of the model, as its ``config.json`` holds it.
        settings: of its quantization.
        task: what it answers: the name of a kind of head, or one of :data:`PRETRAINING_HEADS`.
        hidden_exponent: k of the scale 2^-k of the final stream.
        embeddings, layers, final_norm, heads: its parts.
    """

    config: dict[str, object]
    settings: dict[str, object]
    task: str
    hidden_exponent: int
    embeddings: Embeddings
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    heads: Heads = field(default_factory=Heads)

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.embeddings.word.shape[1]

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have."""
        return self.embeddings.position.shape[0] - self.embeddings.first_position

    def hidden_values(self, hidden: Tensor) -> Tensor:
        """The real values of the final stream, float32."""
        return hidden.float().mul_(2.0**-self.hidden_exponent)
