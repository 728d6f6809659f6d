# SPDX-License-Identifier: Apache-2.0
"""Attention on a GPU: flash attention over packed sequences is attention within each of them."""

from __future__ import annotations

import pytest
import torch

from megatron_bert.model.attention_functions import explicit_attention, has_packed_attention, packed_attention
from tests.megatron_bert.model.support import make_batch

pytestmark = pytest.mark.gpu
LENGTHS = (24, 1, 17, 40)
HEADS, DIM = 2, 16
#: Rounding of values below 4 to eight bits, a few times.
ROUNDING = 4 * 4 * 2**-8


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    """Queries, keys and values ``[T, A, 3, D]``, and boundaries."""
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(sum(LENGTHS), HEADS, 3, DIM, generator=generator).to("cuda", torch.bfloat16)
    boundaries = torch.tensor((0, *LENGTHS)).cumsum(0).to("cuda", torch.int32)
    assert has_packed_attention(qkv)
    return qkv.requires_grad_(), boundaries


def attend(qkv: torch.Tensor, boundaries: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    return packed_attention(*qkv.unbind(2), boundaries, max(LENGTHS), dropout)  # type: ignore[call-arg]


def test_within_each_sequence() -> None:
    qkv, boundaries = packed()
    whole = qkv.detach().double().requires_grad_()
    parts = [part.transpose(0, 1).unsqueeze(0).unbind(3) for part in whole.split(LENGTHS)]
    expected = torch.cat([explicit_attention(*part, None)[0].transpose(0, 1) for part in parts])
    actual = attend(qkv, boundaries)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=ROUNDING)
    weight = torch.linspace(-1, 1, DIM, device="cuda")
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(qkv.grad.double(), whole.grad, rtol=0, atol=ROUNDING)


def test_dropout() -> None:
    """Probabilities are dropped at the right rate, the same by the same seed, and the same backward as forward."""
    qkv, boundaries = packed()
    with torch.no_grad():
        draws = torch.stack([attend(qkv, boundaries, 0.25).float() for _ in range(600)])
        exact = attend(qkv, boundaries).float()
    # The mean of 600 draws stands five standard errors from the expectation nowhere, among some thousand numbers.
    error = draws.std(0) / 600**0.5
    assert bool(((draws.mean(0) - exact).abs() < 5 * error + ROUNDING / 4).all())
    # The second sequence is one token: its probability of 1 is dropped, or becomes 4 / 3.
    single, value = draws[:, LENGTHS[0], :, 0], qkv[LENGTHS[0], :, 2, 0].float()
    kept = (single / value).detach()
    assert bool(((kept.abs() < 1e-6) | ((kept - 4 / 3).abs() < 2**-6)).all())
    assert abs(float((kept == 0).float().mean()) - 0.25) < 5 * (0.25 * 0.75 / kept.numel()) ** 0.5

    outputs = []
    for _ in range(2):
        torch.cuda.manual_seed(7)
        outputs.append(attend(qkv, boundaries, 0.25))
    assert torch.equal(*outputs)
    # Linear in the values, so sum(G * out) = sum(V * dV) if the gradient drops what the output does.
    weight = torch.randn(outputs[0].shape, generator=torch.Generator("cuda").manual_seed(3), device="cuda").bfloat16()
    (gradient,) = torch.autograd.grad(outputs[0], qkv, weight)
    forward = (outputs[0].double() * weight.double()).sum()
    backward = (qkv.double() * gradient.double())[:, :, 2].sum()
    scale = (outputs[0].double() * weight.double()).norm()
    assert abs(float(forward - backward)) < 16 * 2**-8 * float(scale)


@pytest.mark.parametrize("dim", [4, 12, 264])
def test_other_sizes_are_left_to_the_other_kernels(dim: int) -> None:
    assert not has_packed_attention(torch.empty(3, 1, 3, dim, device="cuda", dtype=torch.bfloat16))
    assert not has_packed_attention(torch.empty(3, 1, 3, 64, device="cuda"))


def test_batches_move_without_waiting() -> None:
    batch = make_batch(packed=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = batch.to(torch.device("cuda", 0))
        again = moved.to(torch.device("cuda", 0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(moved.tokens.cpu(), batch.tokens)
    assert torch.equal(again.layout.boundaries.cpu(), batch.layout.boundaries)
