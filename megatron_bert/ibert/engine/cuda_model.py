# SPDX-License-Identifier: Apache-2.0
"""A plan on a device, and the kernels in their order.

Shapes: T tokens, R rows, H hidden size. Launches are asynchronous; nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from megatron_bert.ibert.engine import cuda_kernels as kernels
from megatron_bert.ibert.engine.backend import HeadName
from megatron_bert.ibert.engine.plan import (
    Dense,
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
from megatron_bert.ibert.layer_norm import normal_bits

#: Queries of a block of attention, and keys that it takes at a time.
BLOCK_QUERIES, BLOCK_KEYS = 64, 64
#: Columns of a head that a block of attention has at most.
_LARGEST_CHUNK = 128


#: Types of a product's results by the step that follows it.
RESULTS = {
    "narrow": torch.int8,
    "gelu": torch.int8,
    "add": torch.int16,
    "gelu_wide": torch.int16,
    "tanh": torch.int16,
    "wide": torch.int32,
}


def _tile(rows: int, columns: int, depth: int, warps: int, stages: int) -> dict[str, int]:
    """How a product is divided: the block of a program, its warps, and the loads that are on their way at once."""
    block = {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "BLOCK_DEPTH": depth}
    return block | {"num_warps": warps, "num_stages": stages}


#: Tiles by the rows they are for, at most; the last for all others. They have not been timed on a GPU yet.
_TILES = {16: _tile(16, 64, 128, 4, 4), 1024: _tile(64, 64, 128, 4, 4), 2**31: _tile(128, 128, 128, 8, 3)}


def tile_for(rows: int, step: str) -> dict[str, int]:
    """The tile of a product with so many rows, and the step after it: the registers hold few quotients of tanh."""
    return next(tile for most, tile in _TILES.items() if rows <= most or step == "tanh")


def block_size(columns: int) -> int:
    """The power of two that holds a row."""
    return 1 << max(columns - 1, 1).bit_length()


def row_launch(rows: int, columns: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the sizes of a kernel that goes by rows.

    Where a row is long, few warps share it: what is computed once per row, each of them computes.
    """
    block = block_size(columns)
    own = max(1024 // block, 1)
    sizes = {"COLUMNS": columns, "BLOCK": block, "ROWS": own, "num_warps": min(max(block // 1024, 1), 8)}
    return (triton.cdiv(rows, own),), sizes


class Linear(NamedTuple):
    """A matrix and the step after it; see :func:`~megatron_bert.ibert.engine.cuda_kernels.linear`."""

    weight: Tensor
    bias: Tensor
    shift: Tensor
    multiplier: Tensor
    numbers: Tensor
    step: str

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``x`` int8 ``[R, K]``; the result ``[R, N]``, in ``out`` if it is given."""
        rows, (columns, depth) = len(x), self.weight.shape
        out = torch.empty(rows, columns, dtype=RESULTS[self.step], device=x.device) if out is None else out
        tile = tile_for(rows, self.step)
        grid = (triton.cdiv(rows, tile["BLOCK_ROWS"]), triton.cdiv(columns, tile["BLOCK_COLUMNS"]))
        even = depth % tile["BLOCK_DEPTH"] == 0
        kernels.linear[grid](x, *self[:5], out, rows, columns, depth, STEP=self.step, EVEN=even, **tile)
        return out


class Normalize(NamedTuple):
    """A layer norm; see :func:`~megatron_bert.ibert.engine.cuda_kernels.normalize`."""

    gain: Tensor
    offset: Tensor
    numbers: Tensor
    wide: bool
    short: bool

    def __call__(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """int16 ``[R, H]`` to the stream from there on, and int8 of the same shape, empty without ``short``."""
        grid, sizes = row_launch(*stream.shape)
        wide = torch.empty_like(stream) if self.wide else stream
        short = torch.empty(stream.shape if self.short else 0, dtype=torch.int8, device=stream.device)
        options = {"FRACTION": normal_bits(stream.shape[1]), "WIDE": self.wide, "SHORT": self.short}
        kernels.normalize[grid](stream, *self[:3], wide, short, len(stream), **sizes, **options)
        return wide, short


class Narrow(NamedTuple):
    """The stream in 8 bits."""

    numbers: Tensor

    def __call__(self, stream: Tensor) -> Tensor:
        """int16 ``[R, H]`` to int8."""
        grid, sizes = row_launch(*stream.shape)
        out = torch.empty_like(stream, dtype=torch.int8)
        kernels.narrow[grid](stream, self.numbers, out, len(stream), **sizes)
        return out


class Attend(NamedTuple):
    """Attention of sequences that stand end to end."""

    heads: int
    numbers: Tensor

    def __call__(self, qkv: Tensor, blocks: Tensor) -> Tensor:
        """int8 ``[T, 3H]`` to ``[T, H]``; ``blocks`` of :func:`query_blocks`."""
        tokens, hidden = len(qkv), qkv.shape[1] // 3
        dim = hidden // self.heads
        chunk = min(max(block_size(dim), 32), _LARGEST_CHUNK)
        chunks = triton.cdiv(dim, chunk)
        out = torch.empty(tokens, hidden, dtype=torch.int8, device=qkv.device)
        sizes = {"DIM": dim, "BLOCK_DIM": chunk, "CHUNKS": chunks, "EVEN": dim == chunk * chunks}
        sizes |= {"BLOCK_QUERIES": BLOCK_QUERIES, "BLOCK_KEYS": BLOCK_KEYS, "num_warps": 4, "num_stages": 2}
        kernels.attend[(len(blocks), self.heads, chunks)](qkv, blocks, self.numbers, out, hidden, **sizes)
        return out


def query_blocks(starts: Tensor) -> Tensor:
    """Blocks of queries, none of which has two sequences.

    Args:
        starts: integers ``[B + 1]``, where each sequence begins, and the end.

    Returns:
        int32 ``[n, 3]``: the first query, and the first token of its sequence and of the next.
    """
    lengths = starts.diff().long()
    counts = (lengths + (BLOCK_QUERIES - 1)).div(BLOCK_QUERIES, rounding_mode="floor")
    sequence = torch.repeat_interleave(counts)
    within = torch.arange(len(sequence)) - (counts.cumsum(0) - counts)[sequence]
    first = starts[:-1].long()[sequence]
    return torch.stack((first + within * BLOCK_QUERIES, first, first + lengths[sequence]), 1).int()


class _Layer(NamedTuple):
    query_key_value: Linear
    attend: Attend
    attention_output: Linear
    between: Normalize
    intermediate: Linear
    output: Linear
    after: Normalize


class CudaModel:
    """A plan's tensors on a device.

    Args:
        plan: to run.
        device: where.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.device, self.hidden = device, plan.hidden_size
        tables, layers = plan.embeddings, plan.layers
        words, rescale = self._moved(tables.word), tables.word_rescale
        others = (rescale.shift, rescale.multiplier, tables.position, tables.token_type)
        self._tables = (words, *map(self._moved, others), self._numbers(tables.limit))
        # What makes the first layer's input, and what ends each layer, which makes that of the next.
        if tables.norm is None:
            assert plan.final_norm is not None
            before = [self._normalize(layer.attention_norm, wide=False) for layer in layers]
            self._before, *after = [*before, self._normalize(plan.final_norm)]
            between = [self._normalize(layer.mlp_norm, wide=False) for layer in layers]
        else:
            readings = [*(layer.read_attention for layer in layers), None]
            ends = (tables.norm, *(layer.mlp_norm for layer in layers))
            self._before, *after = [self._normalize(norm, read) for norm, read in zip(ends, readings, strict=True)]
            between = [self._normalize(layer.attention_norm, layer.read_mlp) for layer in layers]
        self._layers = [self._layer(*each) for each in zip(layers, between, after, strict=True)]
        heads = plan.heads
        makers: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]]
        makers = {"pooler": self._pooler, "classifier": self._dense, "pair": self._dense, "masked": self._masked}
        self._heads = {name: makers[name](getattr(heads, name)) for name in heads.present}

    def encode(self, ids: Tensor, blocks: Tensor) -> Tensor:
        """The encoder.

        Args:
            ids: int32 ``[3, T]`` on the device: words, positions and types; T at least 1.
            blocks: of :func:`query_blocks`, on the device.

        Returns:
            int16 ``[T, H]``.
        """
        stream = torch.empty(ids.shape[1], self.hidden, dtype=torch.int16, device=self.device)
        grid, sizes = row_launch(*stream.shape)
        kernels.embed[grid](ids, *self._tables, stream, len(stream), **sizes)
        stream, narrow = self._before(stream)
        for layer in self._layers:
            layer.attention_output(layer.attend(layer.query_key_value(narrow), blocks), stream)
            stream, narrow = layer.between(stream)
            layer.output(layer.intermediate(narrow), stream)
            stream, narrow = layer.after(stream)
        return stream

    def head(self, name: HeadName, rows: Tensor) -> Tensor:
        """A head on int16 ``[R, H]``, R at least 1; see :class:`~megatron_bert.ibert.engine.backend.Executable`."""
        return self._heads[name](rows)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def _numbers(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _normalize(self, norm: Norm, read: Read8 | None = None, *, wide: bool = True) -> Normalize:
        """To 16 bits, of which 8 are read if there is a reading; or with ``wide`` false to 8 alone."""
        reading = () if read is None else (read.shift, read.multiplier, read.limit)
        numbers = self._numbers(norm.read, norm.read_limit, norm.shift, norm.limit, norm.epsilon, *reading)
        gain, offset = self._moved(norm.gain), self._moved(norm.offset)
        return Normalize(gain, offset, numbers, wide, short=not wide or read is not None)

    def _linear(self, matrix: Matrix, after: Rescale | Wide, step: str, *values: int, zero_point: int = 128) -> Linear:
        """A matrix whose input is stored as 128 less than what has ``zero_point``, and numbers of the step."""
        bias = matrix.bias
        if zero_point != 128:
            bias = bias + (128 - zero_point) * matrix.weight.sum(1, dtype=torch.int32)
        weight, bias, shift, multiplier = map(self._moved, (matrix.weight, bias, after.shift, after.multiplier))
        return Linear(weight, bias, shift, multiplier, self._numbers(*values), step)

    def _layer(self, layer: Layer, between: Normalize, after: Normalize) -> _Layer:
        a, gelu, linear = layer.attention, layer.gelu, self._linear
        attention = (a.score_shift, a.score_multiplier, a.mean_multiplier, a.mean_exponent, a.context_limit)
        first = (layer.attention_read, layer.attention_limit)
        activation = (gelu.exponent, gelu.multiplier, gelu.zero_point, gelu.top)
        second = (layer.output_read, layer.output_limit)
        return _Layer(
            linear(layer.query_key_value, layer.query_key_value_rescale, "narrow", a.limit),
            Attend(a.heads, self._numbers(*attention)),
            linear(layer.attention_output, layer.attention_output_rescale, "add", *first),
            between,
            linear(layer.intermediate, layer.intermediate_rescale, "gelu", *activation),
            linear(layer.output, layer.output_rescale, "add", *second, zero_point=gelu.zero_point),
            after,
        )

    # ---------------------------------------------------------------- heads

    def _narrow(self, read: Read8) -> Narrow:
        return Narrow(self._numbers(read.shift, read.multiplier, read.limit))

    def _pooler(self, head: Pooler) -> Callable[[Tensor], Tensor]:
        read, linear = self._narrow(head.read), self._linear(head.matrix, head.rescale, "tanh")
        return lambda rows: linear(read(rows))

    def _dense(self, head: Dense) -> Callable[[Tensor], Tensor]:
        read, linear = self._narrow(head.read), self._linear(head.matrix, head.wide, "wide")
        return lambda rows: linear(read(rows))

    def _masked(self, head: MaskedLanguage) -> Callable[[Tensor], Tensor]:
        steps = (head.exponent, head.gelu_read, head.gelu_limit)
        read, norm = self._narrow(head.read), self._normalize(head.norm, wide=False)
        dense = self._linear(head.dense, head.rescale, "gelu_wide", *steps)
        words = self._tables[0] if head.decoder is None else head.decoder
        decoder = self._linear(Matrix(words, head.bias), head.wide, "wide")
        return lambda rows: decoder(norm(dense(read(rows)))[1])
