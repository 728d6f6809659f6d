# SPDX-License-Identifier: Apache-2.0
"""Shapes that are remembered are those torch's own mode finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_bert.planning.shapes import ShapesMode

aten = torch.ops.aten

#: A tensor that was made before, and has numbers.
NUMBERS = torch.arange(24).view(6, 4)

#: Of two matrices 6 x 4 in one buffer.
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "fresh": lambda x, y: [x * y, x * 2, x * 2.0, x.int() * 2, x.int() * 2.0, x.t() + y.t(), x.sum(0)],
    "several": lambda x, y: [*aten.native_layer_norm(x, [4], y[0], y[1], 1e-5), *torch.topk(x, 2)],
    "in place": lambda x, y: [x.mul_(y), x.zero_(), x.copy_(y), *torch._foreach_add([x, y], 1.0)],
    "given results": lambda x, y: [torch.add(x, y, out=x), torch.mm(x, y.t(), out=x.new_empty(6, 6))],
    "views": lambda x, y: [
        *(
            x.view(3, 8),
            x[1:3],
            x[:, 1],
            x.t(),
            x.T.unsqueeze(1),
            x.expand(2, 6, 4),
            x.detach(),
            x.as_strided((2,), (3,)),
        ),
        *(*x.split(4), *x.unbind(0), *y.chunk(2, 1), *aten.split_with_sizes(y, [2, 4]), x.view(torch.int32)),
    ],
    "views without a name": lambda x, y: [aten._unsafe_view(x, [24]), x.reshape(24), x.t().reshape(24), x.contiguous()],
    "numbers that are known": lambda x, y: [torch.tensor(2.0) * 3, x * torch.tensor([1, 2, 3, 4])],
    "made": lambda x, y: [
        *(torch.empty(3, 4), torch.zeros(2, dtype=torch.int64), torch.arange(2, 7), torch.arange(0, 1, 0.25)),
        *(torch.full((2, 2), 1.0), torch.full((2, 2), 1), torch.empty_strided((2, 3), (1, 2)), torch.randperm(5)),
    ],
    "at random": lambda x, y: [
        *(x.normal_(generator=generator) for generator in (None, torch.Generator())),
        *(torch.bernoulli(y, generator=generator) for generator in (None, torch.Generator())),
    ],
    "tensors with numbers": lambda x, y: [
        *(x * NUMBERS, NUMBERS * x, NUMBERS * 2, NUMBERS.t() >= 3, torch.cat([x, NUMBERS]), x[NUMBERS[:, 0] % 4]),
        *(NUMBERS[1:], aten._unsafe_view(NUMBERS, [24]), NUMBERS[0, :1] * 2, x.copy_(NUMBERS)),
        *(NUMBERS.mul_(1), torch.add(NUMBERS, 1, out=NUMBERS)),
    ],
    "losses": lambda x, y: [F.cross_entropy(x, y[:, 0].long()), F.embedding(y.long(), x), F.dropout(x, 0.5)],
}


def described(mode: FakeTensorMode, operation: Callable[[Tensor, Tensor], Any], offset: int) -> list[Any]:
    with mode, torch.no_grad():
        buffer = torch.empty(offset + 48)
        x, y = buffer[offset : offset + 24].view(6, 4), buffer[offset + 24 :].view(6, 4)
        return [
            (
                *(out.shape, out.stride(), out.dtype, out.device, out.storage_offset(), out.untyped_storage().nbytes()),
                out.untyped_storage()._cdata == buffer.untyped_storage()._cdata,
                out is x,
                type(out),
            )
            for out in operation(x, y)
        ]


@pytest.mark.parametrize("name", OPERATIONS)
def test_are_those_of_torch(name: str) -> None:
    """Found and remembered, wherever the arguments lie in their storage."""
    for offset in (0, 0, 48):
        modes = FakeTensorMode(allow_non_fake_inputs=True), ShapesMode(allow_non_fake_inputs=True)
        expected, found = (described(mode, OPERATIONS[name], offset) for mode in modes)
        assert found == expected


def test_what_fails_fails_again() -> None:
    for _ in range(2):
        with ShapesMode(), pytest.raises(RuntimeError):
            torch.empty(2, 3) + torch.empty(2, 4)


def test_what_is_in_the_storage_of_an_argument_stays_there() -> None:
    for _ in range(2):
        with ShapesMode():
            whole, result = torch.empty(5, 4), torch.empty(5, 4)  # sizes of no other test
            place = whole.untyped_storage()._cdata
            assert aten._unsafe_view(whole, [20]).untyped_storage()._cdata == place
            place = result.untyped_storage()._cdata
            assert aten.mul.out(whole, whole, out=result).untyped_storage()._cdata == place
