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

import struct
import sys
from typing import Any, cast

import torch
from torch import Tensor

from parallel.first_order import in_place
from parallel.recording import is_recorded
from parallel.simulated_device import has_numbers, on_gpu

_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))
_COLUMN_KEY = 0x9E3779B9 - (1 << 32)
_KEY_MULTIPLIERS = (0x5851F42D4C957F2D, 0x14057B7EF767814F)


def _fold_halves(x: Tensor) -> Tensor:
    """int32 with the high half xored into the low one. The mask makes the shift logical: torch's carries the sign."""
    return x ^ ((x >> 16) & 0xFFFF)


def _scramble_(x: Tensor) -> Tensor:
    """Scramble folded int32 in place: each bit that went in flips each high bit with probability about one half.

    The closing xor-shift of such hashes is left out: it changes the low half alone, and what counts here are the high
    bits. In place because on the CPU fresh memory costs several times the arithmetic.
    """
    x.mul_(_MULTIPLIERS[0])
    return x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_MULTIPLIERS[1])


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
    return _hashed(numbers)


def _hashed(numbers: Tensor) -> Tensor:
    """Hashes of column numbers. Folding goes with xor: of rows and columns apart, it costs nothing for each element."""
    return _fold_halves(_scramble_(_fold_halves(numbers ^ _COLUMN_KEY)))


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
    return _bits(keys, columns, first_column, hashed) >= _least(probability)


def keep_scale(
    keys: Tensor, columns: int | Tensor, probability: float, first_column: int = 0, *, hashed: Tensor | None = None
) -> Tensor:
    """What elements are multiplied with: ``1 / (1 - probability)`` where they are kept, float32 ``[..., columns]``.

    It takes four times the memory of a mask, but a processor multiplies by it at once: torch converts a mask first.
    Arguments are those of :func:`keep_mask`.
    """
    kept = _bits(keys, columns, first_column, hashed).ge_(_least(probability))
    # As an integer times the bits of the scale, which are those of 0.0 times 0: in place.
    return kept.mul_(_float_bits(1.0 / (1.0 - probability))).view(torch.float32)


def _float_bits(value: float) -> int:
    """The bits of a number in float32, as a signed int32."""
    return cast(int, struct.unpack("<i", struct.pack("<f", value))[0])


def _least(probability: float) -> int:
    """The least of 32 random bits, as a signed int32, that keep an element."""
    return round(probability * 2**32) - 2**31


def _bits(keys: Tensor, columns: int | Tensor, first_column: int, hashed: Tensor | None) -> Tensor:
    # Columns are distinguished by xor, not by a multiply: a multiplied range overflows int32 in compiled CPU code.
    if hashed is None:
        if isinstance(columns, Tensor) and columns.dim():  # traced sizes are tensors of no dimension
            hashed = _hashed(columns)
        else:
            held = not is_recorded() and has_numbers(keys)
            hashed = (hashed_columns if held else _hashed_columns)(cast("int", columns), keys.device, first_column)
    return _scramble_(_fold_halves(_row_seed(keys))[..., None] ^ hashed)


def mask_and_scale(x: Tensor, kept: Tensor, probability: float) -> Tensor:
    """``x / (1 - probability)`` where ``kept``, bool of its shape, and 0 elsewhere.

    A product, because a processor takes twice as long to choose.
    """
    return (x * (1.0 / (1.0 - probability))).mul_(kept)


def drop(
    x: Tensor,
    keys: Tensor,
    columns: int | Tensor,
    probability: float,
    first_column: int = 0,
    *,
    hashed: Tensor | None = None,
) -> Tensor:
    """What the mask leaves of ``x``, scaled; arguments are those of :func:`keep_mask`."""
    if scales(x):
        return x * keep_scale(keys, columns, probability, first_column, hashed=hashed)
    return mask_and_scale(x, keep_mask(keys, columns, probability, first_column, hashed=hashed), probability)


def scales(x: Tensor) -> bool:
    """Whether :func:`keep_scale` is what ``x`` is best multiplied with; steps are simulated with masks."""
    plain = x.dtype == torch.float32 and x.device.type == "cpu" and not is_recorded()
    return plain and not on_gpu(x) and has_numbers(x)


class _RehashedDropout(torch.autograd.Function):
    """Dropout that keeps nothing: its backward pass hashes the mask again.

    The keys are held outside of what autograd saves, so that recomputation of a layer that ends in dropout need not
    run as far as here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, probability: float, first_column: int) -> Tensor:
        ctx.mask = (keys, x.shape[-1], probability, first_column)
        return drop(x, *ctx.mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return drop(gradient, *ctx.mask), None, None, None


class _AddedDropout(torch.autograd.Function):
    """``residual + x * scale`` in one pass, and one for the gradient of ``x``."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return torch.addcmul(residual, x, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradient, gradient * scale, None


def keyed_dropout(
    x: Tensor,
    probability: float,
    keys: Tensor,
    first_column: int = 0,
    *,
    keep_nothing: bool = False,
    hashed: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Zero elements with ``probability`` and scale the rest by 1 / (1 - probability).

    Args:
        x: ``[..., columns]``.
        probability: that an element is dropped; 0 returns ``x`` itself.
        keys: int64 ``[...]``, one per row of ``x``.
        first_column: global index of the first column, where columns are divided over ranks.
        keep_nothing: compute the mask again in the backward pass instead of keeping it, a byte an element and four in
            float32 on processors. Compiled code decides that for itself.
        hashed: as of :func:`keep_mask`.
        residual: what the result is added to, like ``x``.
    """
    if residual is not None and probability > 0.0 and not keep_nothing and in_place(x):
        scale = keep_scale(keys, x.shape[-1], probability, first_column, hashed=hashed)
        return _AddedDropout.apply(residual, x, scale)
    if probability > 0.0:
        if keep_nothing and not is_recorded():
            x = _RehashedDropout.apply(x, keys, probability, first_column)
        else:
            x = drop(x, keys, x.shape[-1], probability, first_column, hashed=hashed)
    return x if residual is None else residual + x
