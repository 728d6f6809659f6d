# SPDX-License-Identifier: Apache-2.0
"""The kernels of the cuda backend.

Shapes: T tokens, N rows and K columns of a matrix, H hidden size. Tensors are contiguous. ``numbers`` are the scalars
of a step, int64 on the device, in the order of :mod:`megatron_bert.ibert.engine.cuda_model`. Loads outside of a tensor
are of its last row instead, whose results are not stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_bert.ibert.engine.cuda_arithmetic import (
    bit_length,
    clamp,
    gelu,
    multiply_short,
    narrowed,
    numerators,
    power,
    quotient,
    read8,
    read16,
    square_root,
    tanh,
)


@triton.jit
def number(numbers, place):
    """A scalar, in 32 bits."""
    return tl.load(numbers + place).to(tl.int32)


@triton.jit(do_not_specialize=["rows"])
def linear(
    x,
    weight,
    bias,
    shift,
    multiplier,
    numbers,
    out,
    rows,
    columns,
    depth,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """A matrix product, int8 ``[T, K]`` by int8 ``[N, K]``, and the step that follows it, named by ``STEP``.

    ========== =============================== =====================
    STEP       result ``[T, N]``               numbers
    ========== =============================== =====================
    narrow     int8                            limit
    add        int16, added to what ``out`` is read, limit
    gelu       int8, 128 less than unsigned    exponent, multiplier, zero point, top
    gelu_wide  int16                           exponent, read, limit
    tanh       int16
    wide       int32
    ========== =============================== =====================

    ``EVEN``: K is divisible by the block.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inner = tl.arange(0, BLOCK_DEPTH)
    own = tl.minimum(column, columns - 1)
    left = x + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * depth + inner[None, :]
    right = weight + own.to(tl.int64)[None, :] * depth + inner[:, None]
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
    for at in range(0, depth, BLOCK_DEPTH):
        if EVEN:
            a = tl.load(left + at)
            b = tl.load(right + at)
        else:
            a = tl.load(left + at, mask=(inner < depth - at)[None, :], other=0)
            b = tl.load(right + at, mask=(inner < depth - at)[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    sums += tl.load(bias + own)[None, :]
    there = (row < rows)[:, None] & (column < columns)[None, :]
    place = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    s = tl.load(shift + own)[None, :]
    m = tl.load(multiplier + own)[None, :]
    if STEP == "wide":
        s = s.to(tl.int64)
        y = (sums.to(tl.int64) * m + ((s * 0 + 1) << (s - 1))) >> s
        tl.store(place, clamp(y, -16777215, 16777215).to(tl.int32), mask=there)
    else:
        y = multiply_short(narrowed(sums, s.to(tl.int32)), m.to(tl.int32))
        if STEP == "narrow":
            limit = number(numbers, 0)
            tl.store(place, clamp(y, -limit, limit).to(tl.int8), mask=there)
        elif STEP == "tanh":
            tl.store(place, tanh(clamp(y, -16384, 16384)).to(tl.int16), mask=there)
        elif STEP == "add":
            limit = number(numbers, 1)
            before = read16(tl.load(place, mask=there, other=0).to(tl.int32), number(numbers, 0))
            tl.store(place, clamp(before + y, -limit, limit).to(tl.int16), mask=there)
        else:
            y = gelu(y, number(numbers, 0))
            if STEP == "gelu":
                zero = number(numbers, 2)
                y = clamp(multiply_short(y, number(numbers, 1)) + zero, 0, number(numbers, 3))
                tl.store(place, (y - 128).to(tl.int8), mask=there)
            else:
                limit = number(numbers, 2)
                y = clamp(read16(y, number(numbers, 1)), -limit, limit)
                tl.store(place, y.to(tl.int16), mask=there)


@triton.jit
def places(rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Where the elements of a program's ``ROWS`` rows are, and which of them there are; both ``[ROWS, BLOCK]``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    return row.to(tl.int64)[:, None] * COLUMNS + column[None, :], (row < rows)[:, None] & (column < COLUMNS)[None, :]


@triton.jit
def looked_up(table, row, there, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a table, in 32 bits."""
    at = row.to(tl.int64)[:, None] * COLUMNS + tl.arange(0, BLOCK)[None, :]
    return tl.load(table + at, mask=there, other=0).to(tl.int32)


@triton.jit(do_not_specialize=["rows"])
def embed(
    ids,
    words,
    shift,
    multiplier,
    positions,
    types,
    numbers,
    out,
    rows,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sums of tokens' rows: ids int32 ``[3, T]`` (word, position, type) to int16 ``[T, H]``; number limit."""
    at, there = places(rows, ROWS, COLUMNS, BLOCK)
    own = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), rows - 1)
    limit = number(numbers, 0)
    word = tl.load(ids + own)
    x = narrowed(looked_up(words, word, there, COLUMNS, BLOCK), tl.load(shift + word).to(tl.int32)[:, None])
    x = clamp(multiply_short(x, tl.load(multiplier + word).to(tl.int32)[:, None]), -limit, limit)
    x += looked_up(positions, tl.load(ids + rows + own), there, COLUMNS, BLOCK)
    x += looked_up(types, tl.load(ids + rows * 2 + own), there, COLUMNS, BLOCK)
    tl.store(out + at, clamp(x, -limit, limit).to(tl.int16), mask=there)


@triton.jit(do_not_specialize=["rows"])
def narrow(stream, numbers, out, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The stream in 8 bits; numbers shift, multiplier, limit."""
    at, there = places(rows, ROWS, COLUMNS, BLOCK)
    x = tl.load(stream + at, mask=there, other=0).to(tl.int32)
    x = read8(x, number(numbers, 0), number(numbers, 1), number(numbers, 2))
    tl.store(out + at, x.to(tl.int8), mask=there)


@triton.jit(do_not_specialize=["rows"])
def normalize(
    stream,
    gain,
    offset,
    numbers,
    wide,
    short,
    rows,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FRACTION: tl.constexpr,
    WIDE: tl.constexpr,
    SHORT: tl.constexpr,
):
    """Layer norm of int16 ``[T, H]``, with ``FRACTION`` bits of a normalized element.

    ``WIDE`` stores int16 in ``wide``, ``SHORT`` int8 in ``short``: the result, or where there are both, what is read of
    it. Numbers: read, read limit, shift, limit, epsilon, and with both shift, multiplier and limit of the reading.
    """
    at, there = places(rows, ROWS, COLUMNS, BLOCK)
    bound = number(numbers, 1)
    x = read16(tl.load(stream + at, mask=there, other=0).to(tl.int32), number(numbers, 0))
    x = clamp(x, -bound, bound)
    total = tl.sum(x, 1)
    squares = tl.sum((x * x).to(tl.int64), 1)
    variance = squares * COLUMNS - total.to(tl.int64) * total + tl.load(numbers + 4)
    deviation = tl.maximum(square_root(variance), 1).to(tl.uint32)
    length = bit_length(deviation)
    inverse = tl.minimum(quotient(power(length - 1), deviation * 0, deviation, 15), 32767)
    spread = narrowed(x * COLUMNS - total[:, None], (length - 1 - FRACTION)[:, None])
    column = tl.arange(0, BLOCK)
    g = tl.load(gain + column, mask=column < COLUMNS, other=0).to(tl.int32)
    b = tl.load(offset + column, mask=column < COLUMNS, other=0)
    limit = number(numbers, 3)
    y = (multiply_short(spread, inverse[:, None]) * g[None, :] + b[None, :]) >> number(numbers, 2)
    y = clamp(y, -limit, limit)
    if WIDE:
        tl.store(wide + at, y.to(tl.int16), mask=there)
        if SHORT:
            y = read8(y, number(numbers, 5), number(numbers, 6), number(numbers, 7))
    if SHORT:
        tl.store(short + at, y.to(tl.int8), mask=there)


@triton.jit
def scores(queries, keys, last, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr):
    """Queries times keys, int32: addresses of the first element of rows; ``last`` says which keys are there."""
    dim = tl.arange(0, BLOCK_DIM)
    sums = tl.zeros((queries.shape[0], keys.shape[0]), tl.int32)
    for chunk in tl.static_range(CHUNKS):
        part = dim + chunk * BLOCK_DIM
        if EVEN:
            q = tl.load(queries[:, None] + part[None, :])
            k = tl.load(keys[None, :] + part[:, None])
        else:
            q = tl.load(queries[:, None] + part[None, :], mask=(part < DIM)[None, :], other=0)
            k = tl.load(keys[None, :] + part[:, None], mask=(part < DIM)[:, None], other=0)
        sums = tl.dot(q, k, sums, out_dtype=tl.int32)
    return tl.where(last[None, :], sums, -1073741824)  # never the largest


@triton.jit
def attend(
    qkv,
    blocks,
    numbers,
    out,
    hidden,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Attention of a block of queries in a head, in two passes over the keys: largest scores, then numerators.

    A largest score that grows on the way would make what was rounded before it wrong, so it is known first.

    qkv int8 ``[T, 3H]`` to int8 ``[T, H]``; blocks int32 ``[n, 3]``: a block's first query, and the first token of its
    sequence and of the next. Columns of a head are divided into ``CHUNKS``, which ``EVEN`` ones fill. Numbers: score
    shift, score multiplier, mean multiplier, mean exponent, limit.
    """
    block = blocks + tl.program_id(0) * 3
    first = tl.load(block + 1)
    end = tl.load(block + 2)
    row = tl.load(block) + tl.arange(0, BLOCK_QUERIES)
    stride = hidden * 3
    head = qkv + tl.program_id(1) * DIM
    queries = head + clamp(row, 0, tl.maximum(end - 1, 0)).to(tl.int64) * stride
    ahead = tl.arange(0, BLOCK_KEYS)
    largest = tl.full((BLOCK_QUERIES,), -1073741824, tl.int32)
    for at in range(first, end, BLOCK_KEYS):
        key = head + hidden + tl.minimum(at + ahead, end - 1).to(tl.int64) * stride
        found = scores(queries, key, at + ahead < end, DIM, BLOCK_DIM, CHUNKS, EVEN)
        largest = tl.maximum(largest, tl.max(found, 1))
    shift = number(numbers, 0)
    multiplier = tl.load(numbers + 1).to(tl.uint32)
    column = tl.program_id(2) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    count = tl.zeros((BLOCK_QUERIES,), tl.int32)
    values = tl.zeros((BLOCK_DIM,), tl.int32)
    sums = tl.zeros((BLOCK_QUERIES, BLOCK_DIM), tl.int32)
    for at in range(first, end, BLOCK_KEYS):
        token = at + ahead
        key = head + hidden + tl.minimum(token, end - 1).to(tl.int64) * stride
        found = scores(queries, key, token < end, DIM, BLOCK_DIM, CHUNKS, EVEN)
        p = numerators(largest[:, None] - found, shift, multiplier)
        p = tl.where((token < end)[None, :], p, 0)
        count += tl.sum(p, 1)
        there = (token < end)[:, None] & (column < DIM)[None, :]
        v = tl.load((key + hidden)[:, None] + column[None, :], mask=there, other=0)
        # Operands have a sign: 128 less, which the sum of the values makes good.
        sums = tl.dot((p - 128).to(tl.int8), v, sums, out_dtype=tl.int32)
        values += tl.sum(v.to(tl.int32), 0)
    sums += values[None, :] * 128
    count = tl.maximum(count, 1).to(tl.uint32)
    length = bit_length(count)
    inverse = quotient(power(length - 1), count * 0, count, 16)
    mean = (inverse * number(numbers, 2)) >> 20
    down = clamp(length - 5 - number(numbers, 3), -15, 30)
    limit = number(numbers, 4)
    y = clamp(multiply_short(narrowed(sums, down[:, None]), mean[:, None]), -limit, limit)
    there = (row < end)[:, None] & (column < DIM)[None, :]
    place = out + row.to(tl.int64)[:, None] * hidden + tl.program_id(1) * DIM + column[None, :]
    tl.store(place, y.to(tl.int8), mask=there)
