# SPDX-License-Identifier: Apache-2.0
"""The whole pretraining model against transformers' MegatronBert with the same weights: logits, loss and gradients."""

from __future__ import annotations

import itertools

import pytest

from megatron_bert.model.activations import ACTIVATIONS
from tests.megatron_bert.model.huggingface import assert_trains_as, to_huggingface
from tests.megatron_bert.model.support import make_batch, make_model


@pytest.mark.parametrize("act", list(ACTIVATIONS))
def test_same_logits_loss_and_gradients(act):
    assert_trains_as("MegatronBert", make_model(hidden_act=act), make_batch(), to_huggingface)


def test_activations_differ():
    # They are distinguished by the tolerance above, also the two variants of GELU.
    batch = make_batch()
    logits = {act: make_model(hidden_act=act)(batch).masked.detach() for act in ACTIVATIONS}
    for one, other in itertools.combinations(("gelu", "gelu_new", "relu", "silu"), 2):
        assert float((logits[one] - logits[other]).abs().max()) > 1e-4, (one, other)
    assert logits["gelu_pytorch_tanh"].equal(logits["gelu_new"])
    assert logits["swish"].equal(logits["silu"])
