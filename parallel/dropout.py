# SPDX-License-Identifier: Apache-2.0
"""Dropout whose mask is a pure function of what it is applied to.

A mask element depends on a key per row (built from the seed, the step, the global sample, the position and the layer)
and on the global column, never on the rank, the layout, the micro batch or a generator's state. So the same run at any
tensor, data, pipeline or micro batch size drops the same elements, and recomputation needs no saved random state.

The generator is an integer hash: row and column are mixed to 32 bits each, combined, and mixed again by a multiply and
xor-shift finalizer (the shape of those of SplitMix and MurmurHash3). Arithmetic wraps modulo
2^32 in int32, which CPU, CUDA and compiled kernels do alike.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor

from parallel.recording import is_recorded
from parallel.simulated_device import has_numbers

_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))
_COLUMN_KEY = 0x9E3779B9 - (1 << 32)
_KEY_MULTIPLIERS = (0x5851F42D4C957F2D, 0x14057B7EF767814F)


def _mix32_(x: Tensor) -> Tensor:
    """Scramble int32 in place so that each input bit flips each high output bit with probability about one half.

    The closing xor-shift of such hashes is left out: it changes the low half alone, and what counts here are the high
    bits. In place because on the CPU fresh memory costs several times the arithmetic. The masks make the shifts
    logical: torch's shift carries the sign down.
    """
    shifted = x >> 16
    x.bitwise_xor_(shifted.bitwise_and_(0xFFFF)).mul_(_MULTIPLIERS[0])
    torch.bitwise_right_shift(x, 15, out=shifted)
    return x.bitwise_xor_(shifted.bitwise_and_(0x1FFFF)).mul_(_MULTIPLIERS[1])


def fold_in(key: Tensor, value: Tensor | int) -> Tensor:
    """A new key from a key and a number: int64 keys, any broadcastable shapes.

    Chains of ``fold_in`` are order sensitive: folding a then b differs from folding b then a.
    """
    x = key * _KEY_MULTIPLIERS[0] + value
    x = x ^ ((x >> 32) & 0xFFFFFFFF)
    x = x * _KEY_MULTIPLIERS[1]
    return x ^ ((x >> 29) & 0x7FFFFFFFF)


def _row_seed(keys: Tensor) -> Tensor:
    folded = fold_in(keys, 0x2545F491)
    if not is_recorded() and sys.byteorder == "little":
        return folded.contiguous().view(torch.int32)[..., ::2]  # as below, without a kernel
    # The low 32 bits as a signed int32, without relying on how an out-of-range cast behaves.
    low = folded & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)


#: Of numbers of columns that were asked for, so many are kept.
_MOST_HELD = 64
_held: dict[tuple[int, int, torch.device], Tensor] = {}


def hashed_columns(columns: int, device: torch.device, first_column: int = 0) -> Tensor:
    """What :func:`keep_mask` makes of column numbers, computed once: int32 ``[columns]``.

    Args:
        first_column: global index of the first, where columns are divided over ranks.
    """
    place = first_column, columns, device
    if place not in _held:
        while len(_held) >= _MOST_HELD:
            _held.pop(next(iter(_held)))
        with torch.inference_mode(False):
            _held[place] = _hashed_columns(columns, device, first_column)
    return _held[place]


def _hashed_columns(columns: int, device: torch.device, first_column: int) -> Tensor:
    numbers = torch.arange(first_column, first_column + columns, device=device, dtype=torch.int32)
    return _mix32_(numbers ^ _COLUMN_KEY)


def keep_mask(
    keys: Tensor, columns: int | Tensor, probability: float, first_column: int = 0, *, hashed: Tensor | None = None
) -> Tensor:
    """Which elements are kept: bool ``[..., columns]``.

    Args:
        keys: int64 keys, one per row, any shape ``[...]``.
        columns: number of columns here; or their numbers where rows differ in them, int32, broadcastable to
            ``[..., columns]``.
        probability: that an element is dropped, 0 <= probability < 1; exact to 2^-32.
        first_column: global index of the first column here, where columns are divided over ranks.
        hashed: :func:`hashed_columns` of them, for compiled code, which would compute it again for every element.
    """
    # Columns are distinguished by xor, not by a multiply: a multiplied range overflows int32 in compiled CPU code.
    if hashed is None:
        if isinstance(columns, Tensor) and columns.dim():  # traced sizes are tensors of no dimension
            hashed = _mix32_(columns ^ _COLUMN_KEY)
        else:
            held = not is_recorded() and has_numbers(keys)
            hashed = (hashed_columns if held else _hashed_columns)(cast("int", columns), keys.device, first_column)
    bits = _mix32_(_row_seed(keys)[..., None] ^ hashed)
    return bits >= round(probability * 2**32) - 2**31


class _RehashedDropout(torch.autograd.Function):
    """Dropout that keeps nothing: its backward pass hashes the mask again.

    The keys are held outside of what autograd saves, so that recomputation of a layer that ends in dropout need not
    run as far as here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float, keys: Tensor, first_column: int) -> Tensor:
        ctx.mask = (keys, x.shape[-1], probability, first_column)
        return mask_and_scale(x, keep_mask(*ctx.mask), probability)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return mask_and_scale(gradient, keep_mask(*ctx.mask), ctx.mask[2]), None, None, None


def mask_and_scale(x: Tensor, kept: Tensor, probability: float) -> Tensor:
    """``x / (1 - probability)`` where ``kept``, bool of its shape, and 0 elsewhere.

    A product, because a processor takes twice as long to choose.
    """
    return (x * (1.0 / (1.0 - probability))).mul_(kept)


def keyed_dropout(
    x: Tensor,
    probability: float,
    keys: Tensor,
    first_column: int = 0,
    *,
    keep_nothing: bool = False,
    hashed: Tensor | None = None,
) -> Tensor:
    """Zero elements with ``probability`` and scale the rest by 1 / (1 - probability).

    Args:
        x: ``[..., columns]``.
        probability: that an element is dropped; 0 returns ``x`` itself.
        keys: int64 ``[...]``, one per row of ``x``.
        first_column: global index of the first column, where columns are divided over ranks.
        keep_nothing: compute the mask again in the backward pass instead of keeping it, a byte an element. Compiled
            code decides that for itself.
        hashed: as of :func:`keep_mask`.
    """
    if probability == 0.0:
        return x
    if keep_nothing and not is_recorded():
        return _RehashedDropout.apply(x, probability, keys, first_column)
    return mask_and_scale(x, keep_mask(keys, x.shape[-1], probability, first_column, hashed=hashed), probability)
