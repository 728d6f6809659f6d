# SPDX-License-Identifier: Apache-2.0
"""The same bits on a GPU as on the CPU, in the format of matrix products that is quickest there too."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.megatron_bert.ibert.support import padded, quantized_stack, sequences


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("tf32", [False, True])
def test_the_same_bits(placement, tf32, monkeypatch):
    stack = quantized_stack(placement, layers=3)
    tokens, positions, layout = padded(*sequences(64, 33, 1))
    with torch.no_grad():
        here = stack(tokens, positions, layout)
    device = torch.device("cuda")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    there = copy.deepcopy(stack).to(device)
    out = there(tokens.to(device), positions.to(device), layout.to(device))
    assert torch.equal(out.detach().cpu(), here)
    out.square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in there.parameters() if p.grad is not None)
