# SPDX-License-Identifier: Apache-2.0
"""The classes on a GPU: outputs, losses and gradients of the processor, for every head and way of attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.megatron_bert.family.support import (
    HEADS,
    batch_for,
    build,
    changed,
    flatten,
    labels_for,
)

pytestmark = pytest.mark.gpu
#: As on the processor, but products of 32 and 64 terms are summed in blocks.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def _on_the_gpu(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def _compare(model: Any, inputs: dict[str, Any]) -> None:
    """Run on both, forward and backward."""
    other = copy.deepcopy(model).cuda()
    outputs = model(**inputs), other(**_on_the_gpu(inputs))
    for output in outputs:
        loss = getattr(output, "loss", None)
        (next(iter(flatten(output).values())).square().mean() if loss is None else loss).backward()
    theirs = {name: tensor.detach().cpu() for name, tensor in flatten(outputs[1]).items()}
    for name, tensor in flatten(outputs[0]).items():
        torch.testing.assert_close(theirs[name], tensor.detach(), **CLOSE, msg=lambda text, n=name: f"{n}: {text}")
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None and two.grad is not None:
            largest = max(1.0, float(one.grad.abs().max()))
            torch.testing.assert_close(two.grad.cpu(), one.grad, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("skip", [None, False])
def test_every_class(head: str, skip: bool | None) -> None:
    _compare(build(head, skip_padding=skip), batch_for(head) | labels_for(head))


@pytest.mark.parametrize(
    "asked",
    [{"output_attentions": True}, {"output_hidden_states": True}, {"head_mask": torch.tensor([1.0, 0.0, 1.0, 0.5])}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["absolute", "relative_key", "relative_key_query"])
def test_every_way_of_attention(kind: str, asked: dict[str, Any]) -> None:
    _compare(build("Model", changed(position_embedding_type=kind)), batch_for("Model") | asked)


def test_generation() -> None:
    model = build("ForCausalLM")
    prompt = batch_for("ForCausalLM", ragged=False)["input_ids"][:, :4]
    here = model.generate(prompt, max_new_tokens=8)
    there = model.cuda().generate(prompt.cuda(), max_new_tokens=8)
    assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize("head", HEADS)
def test_half_precision(head: str) -> None:
    """Sixteen-bit weights, with the losses of the same weights in float32."""
    model = build(head)
    given = batch_for(head) | labels_for(head)
    exact = model(**given)
    for dtype, close in ((torch.float16, 2**-6), (torch.bfloat16, 2**-3)):
        rounded = copy.deepcopy(model).to("cuda", dtype)(**_on_the_gpu(given))
        if head != "Model":
            torch.testing.assert_close(rounded.loss.float().cpu(), exact.loss, rtol=close, atol=close)
        assert all(bool(t.isfinite().all()) for t in flatten(rounded).values())
