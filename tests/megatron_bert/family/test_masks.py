# SPDX-License-Identifier: Apache-2.0
"""Attention masks of every shape and type, and numbers of tokens that broadcast, beside transformers' class."""

from __future__ import annotations

import pytest
import torch

from tests.megatron_bert.family.support import (
    BATCH,
    CLOSE,
    CONFIG,
    LENGTH,
    Both,
    batch_for,
    build,
    changed,
    peer_of,
    refused,
)
from tests.worlds import make_tensor_parallel, run_world

HEADS, LOWEST = CONFIG.num_attention_heads, torch.finfo(torch.float32).min
IDS = batch_for("Model", ragged=False)["input_ids"]
PAIRS, OF_HEADS = (BATCH, 1, LENGTH, LENGTH), (BATCH, HEADS, LENGTH, LENGTH)
FIRST = (torch.arange(LENGTH) < 5)[None]


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def _hiding(*shape: int, value: float = LOWEST) -> torch.Tensor:
    hidden = _random(*shape) > 0.5
    hidden[..., 0] = False
    return torch.zeros(shape).masked_fill(hidden, value)


#: What is given, and what transformers adds to scores for it where it takes no such thing itself.
MASKS = {
    "bias": (_random(*PAIRS), None),
    "bias-of-heads": (_random(*OF_HEADS), None),
    "bias-of-one-query": (_random(BATCH, 1, 1, LENGTH), None),
    "bias-of-all": (_random(1, HEADS, 1, LENGTH), None),
    "hiding": (_hiding(*PAIRS), None),
    "hiding-of-heads": (_hiding(1, HEADS, LENGTH, LENGTH), None),
    "hiding-and-bias": (_hiding(*OF_HEADS) + _random(*OF_HEADS), None),
    "ones": (torch.ones(PAIRS), None),
    "double": (_random(*PAIRS).double(), _random(*PAIRS)),
    "infinite": (_hiding(*PAIRS, value=-torch.inf), _hiding(*PAIRS)),
    "bool-of-heads": (_hiding(*OF_HEADS) == 0, _hiding(*OF_HEADS)),
    "whole-of-heads": ((_hiding(1, HEADS, 1, LENGTH) == 0).int(), _hiding(1, HEADS, 1, LENGTH)),
    "pairs-for-all": ((_hiding(1, LENGTH, LENGTH) == 0).long(), _hiding(1, 1, LENGTH, LENGTH)),
    "keys-for-all": (FIRST, FIRST.expand(BATCH, -1)),
    "keys-float": (FIRST.float().expand(BATCH, -1), None),
    "keys-short": (FIRST.to(torch.uint8).expand(BATCH, -1), None),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return Both(lambda kind: build("Model", changed(is_decoder=kind == "decoder")), tmp_path_factory.mktemp("peers"))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("case", MASKS)
def test_masks(case, kind, both):
    """By the fused kernels, and written out where probabilities are asked for; with the gradients of the words."""
    mask, theirs = MASKS[case]
    model, peer = both(kind)
    expected = peer(IDS, attention_mask=mask if theirs is None else theirs, output_attentions=True)
    expected.last_hidden_state.square().mean().backward()
    ours = model(IDS, attention_mask=mask)
    ours.last_hidden_state.square().mean().backward()
    torch.testing.assert_close(ours.last_hidden_state, expected.last_hidden_state, **CLOSE)
    words = [each.get_input_embeddings().weight.grad for each in (model, peer)]
    torch.testing.assert_close(*words, **CLOSE)
    shown = model(IDS, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(shown.attentions, expected.attentions, **CLOSE)


def test_a_bias_that_is_trained(both):
    gradients = []
    for model in both("encoder"):
        bias = _hiding(*OF_HEADS).requires_grad_()
        model(IDS, attention_mask=bias).last_hidden_state.square().mean().backward()
        gradients.append(bias.grad)
    torch.testing.assert_close(*gradients, **CLOSE)
    assert float(gradients[0].abs().max()) > 1e-4


def test_queries_that_may_see_nothing(both):
    """They see everything evenly, as the mask of the lowest number makes it in transformers."""
    mask = torch.full(OF_HEADS, LOWEST)
    model, peer = both("encoder")
    expected = peer(IDS, attention_mask=mask).last_hidden_state
    for same in (mask, mask == 0, torch.full_like(mask, -torch.inf)):
        torch.testing.assert_close(model(IDS, attention_mask=same).last_hidden_state, expected, **CLOSE)
    trained = torch.full_like(mask, -torch.inf).requires_grad_()
    torch.testing.assert_close(model(IDS, attention_mask=trained).last_hidden_state, expected, **CLOSE)


def _rows(*values: float) -> torch.Tensor:
    """What is added to the scores of every query: the last value to the rest of the keys."""
    row = torch.tensor([*values, *[values[-1]] * (LENGTH - len(values))])
    return row.expand(BATCH, 1, LENGTH, LENGTH).contiguous()


#: Numbers that hide keys beside others, but where there are no others.
AS_THEY_ARE = {
    "all-999": _rows(-999.0),
    "all-2000": _rows(-2000.0),
    "all-10000": _rows(-10000.0),
    "all-1e5": _rows(-1e5),
    "one-less": _rows(-4000.0, -2000.0),
    "one-more": _rows(-2000.0, -4000.0),
    "infinite-beside": _rows(-torch.inf, -2000.0),
    "lowest-beside": _rows(LOWEST, -10000.0),
    "bias-beside": _rows(-2000.0, 0.0, 3.0),
}


@pytest.mark.parametrize("shown", [False, True], ids=["fused", "written-out"])
@pytest.mark.parametrize("case", AS_THEY_ARE)
def test_large_negative_numbers_are_added_as_they_are(case, shown, both):
    model, peer = both("encoder")
    mask = AS_THEY_ARE[case]
    expected = peer(IDS, attention_mask=mask).last_hidden_state
    found = model(IDS, attention_mask=mask, output_attentions=shown).last_hidden_state
    # Scores lose bits beside large numbers; what differs otherwise is off by more than 0.3.
    torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-4)


@pytest.mark.parametrize("shown", [False, True], ids=["fused", "written-out"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hidden_rows_of_narrow_numbers_are_finite(dtype, shown):
    model = build("Model").to(dtype)
    for value in (LOWEST, torch.finfo(dtype).min, -torch.inf):
        mask = torch.full(OF_HEADS, value).to(dtype)
        assert model(IDS, attention_mask=mask, output_attentions=shown).last_hidden_state.isfinite().all()


def test_masks_of_an_encoder(tmp_path):
    model = build("Model", changed(is_decoder=True, add_cross_attention=True))
    peer = peer_of(model, tmp_path)
    states = _random(BATCH, LENGTH, CONFIG.hidden_size)
    for name in ("bias-of-heads", "hiding", "keys-float"):
        given = {"encoder_hidden_states": states, "encoder_attention_mask": MASKS[name][0]}
        expected = peer(IDS, **given).last_hidden_state
        torch.testing.assert_close(model(IDS, **given).last_hidden_state, expected, **CLOSE)


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
@pytest.mark.parametrize("shape", [(1, LENGTH), (LENGTH,), (BATCH, 1), (1, 1)], ids=str)
def test_numbers_of_tokens_broadcast(name, shape, both):
    numbers = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(8))
    model, peer = both("encoder")
    expected = peer(IDS, **{name: numbers}).last_hidden_state
    torch.testing.assert_close(model(IDS, **{name: numbers}).last_hidden_state, expected, **CLOSE)


REFUSED = {
    "shape": (torch.ones(BATCH, 2, LENGTH, LENGTH), "[3, 2, 9, 9], expected [3, 9] (which tokens count)"),
    "keys": (torch.ones(BATCH, HEADS, LENGTH, 1), "[3, 4, 9, 1], expected"),
    "dimension": (torch.ones(LENGTH), "[9], expected"),
    "not-a-number": (torch.full((1, 1, 1, LENGTH), torch.nan), "holds values that are not numbers"),
    "beyond": (torch.full((1, 1, 1, LENGTH), torch.inf), "holds values that are not numbers"),
    "whole": (torch.full((1, 1, 1, LENGTH), 2), "holds values other than 0 and 1"),
    "added-to-keys": (_hiding(BATCH, LENGTH), "holds values other than 0 and 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_masks_without_a_meaning(case):
    mask, message = REFUSED[case]
    assert message in refused(lambda: build("Model")(IDS, attention_mask=mask))


def _of_all_masks():
    model = build("Model", changed(pruned_heads={1: [0, 3]}), tp=make_tensor_parallel())
    return [model(IDS, attention_mask=mask).last_hidden_state.detach() for mask, _ in MASKS.values()]


def test_masks_of_heads_that_are_divided_and_pruned():
    whole = _of_all_masks()
    for rank in run_world(2, _of_all_masks):
        torch.testing.assert_close(rank, whole, **CLOSE)
