# SPDX-License-Identifier: Apache-2.0
"""Every I-BERT class divided over two and four processes gives the results of one, also with dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.mesh import SINGLE, TensorParallel
from tests.megatron_bert.family.support import flatten, gradients, labels_for
from tests.megatron_bert.ibert.family.support import HEADS, batch_for, build, config_of
from tests.worlds import make_tensor_parallel, run_world

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
ALL = {"output_hidden_states": True, "output_attentions": True}
#: Case -> class, configuration, further arguments.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{head: (head, {}, {}) for head in HEADS},
    "everything": ("ForMaskedLM", {}, ALL),
    "dropout": ("ForSequenceClassification", DROPOUT, {}),
}


def _run(tp: TensorParallel) -> dict[str, dict[str, Tensor]]:
    results = {}
    for case, (head, changes, extra) in CASES.items():
        model = build(head, config_of(head, **changes), tp=tp)
        if case == "dropout":
            model.train()
            torch.manual_seed(7 + 100 * tp.rank)  # ranks need not draw alike: the first one's seed counts
        out = model(**batch_for(head), **labels_for(head), **extra)
        loss = out.last_hidden_state.square().mean() + out.pooler_output.sum() if head == "Model" else out.loss
        loss.backward()
        tensors = {name: tensor.detach() for name, tensor in flatten(out).items()}
        results[case] = tensors | {f"gradient of {name}": tensor for name, tensor in gradients(model).items()}
    return results


def _divided() -> dict[str, dict[str, Tensor]]:
    return _run(make_tensor_parallel())


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Tensor]]:
    return _run(SINGLE)


@pytest.mark.parametrize("size", [2, 4])
def test_equal_results(size, expected):
    for results in run_world(size, _divided):
        assert results.keys() == expected.keys()
        for case, tensors in expected.items():
            assert results[case].keys() == tensors.keys()
            for name, tensor in tensors.items():
                largest = max(1.0, float(tensor.abs().max()))
                torch.testing.assert_close(
                    results[case][name],
                    tensor,
                    rtol=0,
                    atol=1e-5 * largest,
                    msg=lambda t, n=f"{case} {name}": f"{n}: {t}",
                )


def test_dropout_of_the_sequence_head_is_drawn_twice():
    """Its two layers have masks of their own, and so the head's dropout alone changes its result."""
    model = build("ForSequenceClassification", config_of("ForSequenceClassification", classifier_dropout=0.5)).train()
    ids = batch_for("ForSequenceClassification")
    assert not model(**ids).logits.equal(model(**ids).logits)
    head = model.classifier
    ones = torch.ones(4, 32)
    keys = torch.arange(4)
    with torch.no_grad():
        head.dense.weight.copy_(torch.eye(32) * 20)  # tanh is then 1 where the first mask keeps, and 0 where it drops
        head.dense.bias.zero_()
        head.out_proj.weight.zero_()[0].fill_(1.0)
        head.out_proj.bias.zero_()
        kept_twice = model.scores(ones, keys)[:, 0] / 2
        whole = model.scores(ones, None)[0, 0]
    # Each of 32 features stays with probability 1/4: 8 of 32, by the same mask twice it would be 16.
    assert kept_twice.mean() == pytest.approx(8.0, abs=3.0)
    assert whole == pytest.approx(32.0)
