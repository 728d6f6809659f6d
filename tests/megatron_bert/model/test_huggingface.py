"""The whole pretraining model against transformers' MegatronBert with the same weights: logits, loss and gradients."""

from __future__ import annotations

import pytest

from tests.megatron_bert.model.huggingface import assert_trains_as, to_huggingface
from tests.megatron_bert.model.support import make_batch, make_model


@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_same_logits_loss_and_gradients(act):
    assert_trains_as("MegatronBert", make_model(hidden_act=act), make_batch(), to_huggingface)


def test_activations_differ():
    # The two variants of GELU are told apart by the tolerance above.
    batch = make_batch()
    exact, tanh = (make_model(hidden_act=act)(batch).masked for act in ("gelu", "gelu_new"))
    assert float((exact - tanh).detach().abs().max()) > 1e-4
    also_tanh = make_model(hidden_act="gelu_pytorch_tanh")(batch).masked
    assert also_tanh.equal(tanh)
